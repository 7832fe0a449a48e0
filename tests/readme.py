"""README.md from nbs/index.ipynb: `python tests/readme.py` writes it, `tests/test_readme.py` compares."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = "https://github.com/volcal/volcal/blob/main/"  # how pages of the site link to files outside nbs/


def _outputs(cell: dict) -> list[str]:
    texts = ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell["outputs"]]
    return ["    " + line if line else "" for text in texts for line in text.rstrip("\n").split("\n")]


def _links(text: str) -> str:
    """Links of a notebook under nbs/ as links from the top level."""
    text = text.replace(HERE, "../")
    text = re.sub(r"\]\(\.\./", "](", text)
    return re.sub(r"\]\((?!https?:|#|data/|\.)", "](nbs/", text)


def readme() -> str:
    """The text of README.md as the index notebook has it."""
    lines: list[str] = ["<!-- made from nbs/index.ipynb by tests/readme.py -->", ""]
    for cell in json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [_links(source), ""]
        elif "#| hide" not in source:
            lines += ["```python", source.replace('"../data/', '"data/'), "```", "", *_outputs(cell), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")

"""The reader's side: every page is listed, links lead somewhere, pictures have words, the public API is real, the site can be built."""
import ast
import configparser
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from readme import HERE, ROOT

NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))
PAGES = [p for p in NOTEBOOKS if p.parent.name != "apps"]
NAMES = [str(p.relative_to(NBS)) for p in PAGES]


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def markdown(path: Path) -> str:
    """What a page says in Markdown: its cells, and outputs that are Markdown."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    out = ["".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown"]
    return "\n".join(out + ["".join(o["data"]["text/markdown"]) for c in cells(path) for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})])


def without_code(text: str) -> str:
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return "\n".join(re.sub(r"`[^`]*`", "`code`", line) for line in text.split("\n") if not line.startswith("    "))


def listed(entries: list) -> list[str]:
    out = []
    for entry in entries:
        out += [entry] if isinstance(entry, str) else listed(entry["contents"]) if "contents" in entry else [entry["href"]]
    return out


def sidebar() -> list:
    return yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]


def test_every_notebook_is_in_the_sidebar_and_in_order():
    found = listed(sidebar())
    assert sorted(found) == sorted([*NAMES, "CONTRIBUTING.md"]), "nbs/sidebar.yml lists every page under nbs/ once (apps aside)"
    rooms = [name for name in found if re.match(r"\d\d_", name)]
    assert rooms == sorted(rooms)
    assert found[0] == "index.ipynb" and found[1].startswith("tutorials/") and [n for n in found if n.startswith("tutorials/")] == sorted(
        n for n in NAMES if n.startswith("tutorials/"))


@pytest.mark.parametrize("page", [*PAGES, NBS / "CONTRIBUTING.md", ROOT / "README.md", ROOT / "data/sample/README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for text, link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", without_code(markdown(page))):
        if link.startswith(HERE):
            assert (ROOT / link.removeprefix(HERE)).exists(), f"[{text}]({link})"
        elif not link.startswith(("http:", "https:", "mailto:", "#", "data:", "attachment:")):
            assert (page.parent / link.split("#")[0]).exists(), f"[{text}]({link}) in {page.relative_to(ROOT)} leads nowhere"


def alternative_text(cell: dict, output: dict) -> str:
    """The words of a picture: `#| fig-alt` of its cell, else what its output carries."""
    options = "\n".join(re.findall(r"^#\|\s*(fig-alt:.*)$", "".join(cell["source"]), flags=re.M))
    said = (yaml.safe_load(options) or {}).get("fig-alt") if options else None
    return said or output.get("metadata", {}).get("image/png", {}).get("alt", "")


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
def test_pictures_have_words(page):
    for number, cell in enumerate(cells(page)):
        if cell["cell_type"] == "markdown":
            assert all(alt.strip() for alt in re.findall(r"!\[([^\]]*)\]\(", "".join(cell["source"]))), f"a picture without words in cell {number}"
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(alternative_text(cell, output)) > 20, f"the picture of cell {number} has no words: add #| fig-alt: \"what it shows\""


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
def test_outputs_hold_nothing_of_one_machine(page):
    for number, cell in enumerate(cells(page)):
        for output in cell.get("outputs", []):
            said = "".join(output.get("text", [])) + "".join("".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))
            assert output["output_type"] != "error" and not (output.get("name") == "stderr" and "Warning: " in said), f"cell {number}: {said[:300]}"
            found = re.search(r"(/tmp/|/home/|/root/|/Users/|/var/folders/|ipykernel_)\S*", said)
            assert found is None, f"cell {number} shows {found and found[0]}"


def test_every_tutorial_ends_with_where_next():
    for page in NBS.glob("tutorials/*.ipynb"):
        last = [c for c in cells(page) if c["cell_type"] == "markdown"][-1]
        assert "**Where next.**" in "".join(last["source"]), page.name


def public_api() -> dict[str, list[str]]:
    """Modules and names that the API page lists, from its calls of `page`."""
    out: dict[str, list[str]] = {}
    for cell in cells(NBS / "api.ipynb"):
        if cell["cell_type"] == "code" and "page({" in "".join(cell["source"]):
            call = ast.parse("".join(cell["source"])).body[-1].value
            out |= {module: names.split() for module, names in ast.literal_eval(call.args[0]).items()}
    return out


@pytest.mark.parametrize("module, names", public_api().items())
def test_the_api_page_says_what_the_code_says(module, names):
    shown, found = markdown(NBS / "api.ipynb"), importlib.import_module(module)
    for name in names:
        line = inspect.getdoc(getattr(found, name)).splitlines()[0].replace("|", "\\|")
        assert f"| `{name}` | {line} |" in shown, f"the API page is older than {module}.{name}: execute nbs/api.ipynb"


def test_the_package_itself_is_light():
    code = "import sys, volcal; print([name for name in ('numpy', 'pandas', 'pydantic', 'volcal.units') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_contributing_names_what_exists():
    known = {node.name for path in (ROOT / "volcal").rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    known |= {target.id for path in (ROOT / "volcal").rglob("*.py") for node in ast.parse(path.read_text(encoding="utf-8")).body
              if isinstance(node, ast.Assign | ast.AnnAssign) for target in ([node.target] if isinstance(node, ast.AnnAssign) else node.targets)
              if isinstance(target, ast.Name)}
    for name in re.findall(r"`([A-Za-z_]+(?:_[a-z]+|[A-Z][a-z]+|[A-Z_]{4,}))`", markdown(NBS / "CONTRIBUTING.md")):
        if not name.startswith(("VOLCAL_", "btc_", "_USDC")) and name not in ("chromium", "USDC", "volcal", "tests"):
            assert name in known, f"CONTRIBUTING speaks of {name}, which is nowhere"


def test_the_site_is_described_as_nbdev_expects():
    from nbdev.quarto import _nbdev_yml

    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = settings["DEFAULT"]
    values = {k: cfg[k] for k in ("title", "description", "branch", "git_url", "doc_host", "doc_baseurl")}
    assert (NBS / "nbdev.yml").read_text(encoding="utf-8") == _nbdev_yml.format(doc_path=cfg["doc_path"], **values)
    assert cfg["custom_sidebar"] == "True", "else nbdev writes nbs/sidebar.yml anew"
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    assert set(quarto["format"]["html"]["theme"]) == {"light", "dark"}
    assert quarto["metadata-files"] == ["nbdev.yml", "sidebar.yml"] and quarto["website"]["navbar"]["search"]
    assert not (NBS / "contributing.ipynb").exists(), "nbdev would write a CONTRIBUTING.md at the top level from it"
    assert all((NBS / item["href"]).exists() for item in quarto["website"]["navbar"]["left"])


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def test_workflows_run_what_we_run():
    test = workflow("test")["jobs"]["test"]
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert test["strategy"]["matrix"]["python"] == classifiers
    assert test["services"]["postgres"]["ports"] == ["5432:5432"] and "postgresql+psycopg" in test["env"]["VOLCAL_TEST_DATABASE_URL"]
    assert any("VOLCAL_TEST_CHROMIUM" in json.dumps(step) for step in test["steps"])
    assert test["steps"][-1]["run"] == "bash .ci/run"
    docs = workflow("docs")["jobs"]
    uses = [step.get("uses", "").split("@")[0] for step in docs["build"]["steps"]]
    assert "quarto-dev/quarto-actions/setup" in uses and "actions/upload-pages-artifact" in uses
    assert any(step.get("run") == "make docs" for step in docs["build"]["steps"])
    assert docs["deploy"]["needs"] == "build" and docs["deploy"]["steps"][-1]["uses"].startswith("actions/deploy-pages@")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    import preview

    folder = tmp_path_factory.mktemp("site")
    preview.write(folder)
    return folder


def test_every_page_renders_without_quarto(site):
    for name in [*NAMES, "CONTRIBUTING.md"]:
        text = (site / name).with_suffix(".html").read_text(encoding="utf-8")
        assert text.count("<h1") >= 1 and "Traceback (most recent call last)" not in text, name
        told = text.replace("No description has been provided for this image", "")  # nbconvert's own words where there are none
        assert all("alt=" in tag and 'alt=""' not in tag for tag in re.findall(r"<img[^>]*>", told)), name
        local = [link for link in re.findall(r'<(?:a|img|link|script)\s[^>]*?(?:href|src)=["\']([^"\'#]+)', text) if not re.match(r"\w+:", link)]
        missing = [link for link in local if not ((site / name).parent / link).exists()]
        assert not missing, f"{name}: {missing[:3]}"


BUILD = """
import os, sys
os.environ["IN_TEST"] = "1"
from pathlib import Path
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import exec_nb
for name in sys.argv[2:]:
    to = Path(sys.argv[1]) / name
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        exec_nb(Path(name), to, FilterDefaults)
    except BaseException as error:
        print("FAILED", name, " ".join(str(error).split()), "<-", repr(error.__cause__))
"""


def test_every_page_passes_nbdev_on_its_way_to_the_site(tmp_path):
    """What `nbdev_docs` does to each notebook before Quarto sees it: imports and exported cells are run, functions documented."""
    halves = [NAMES[::2], NAMES[1::2]]
    runs = [subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path), *half], cwd=NBS, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for half in halves]
    told = [run.communicate(timeout=600)[0] for run in runs]
    failed = [line for text in told for line in text.splitlines() if line.startswith("FAILED")]
    assert not failed, "\n".join([*failed, "imports of a lesson stand in their own cell; names of annotations are imported, too"])
    assert all((tmp_path / name).exists() for name in NAMES)

"""The site without Quarto: `python tests/preview.py [FOLDER]` writes every page as plain HTML, in the order of the sidebar."""
import re
import shutil
import sys
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

NBS = Path(__file__).resolve().parents[1] / "nbs"
STYLE = """
:root{color-scheme:light dark;--fg:#1c2530;--bg:#fff;--soft:#f3f5f7;--line:#dde2e7;--link:#0b5c99}
@media(prefers-color-scheme:dark){:root{--fg:#dde3ea;--bg:#15191e;--soft:#1f252c;--line:#343c46;--link:#7ab8ea}}
body{margin:0;color:var(--fg);background:var(--bg);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;display:flex}
nav{flex:0 0 230px;padding:18px;font-size:13.5px;border-right:1px solid var(--line);height:100vh;overflow:auto;position:sticky;top:0;box-sizing:border-box}
nav h2{font-size:12.5px;margin:14px 0 4px;text-transform:uppercase;letter-spacing:.05em}nav a{display:block;padding:1px 0}nav a.here{font-weight:700}
main{flex:1;min-width:0;max-width:980px;padding:10px 34px 60px;box-sizing:border-box}a{color:var(--link);text-decoration:none}
img{max-width:100%;height:auto;background:#fff}pre{background:var(--soft);padding:9px 12px;overflow-x:auto;font-size:13px;line-height:1.45;border-radius:5px}
.output_area pre{background:none;border-left:2px solid lightsalmon;border-radius:0}code{font-size:.9em}blockquote{margin:0;opacity:.8;font-size:1.08em}
table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}th,td{border-bottom:1px solid var(--line);padding:4px 10px;text-align:left}
.prompt,.anchor-link{display:none}
@media(min-width:761px){.output_area pre{white-space:pre-wrap}}
@media(max-width:760px){body{flex-direction:column-reverse}nav{height:auto;position:static;flex:none;border:0;border-top:1px solid var(--line)}
main{padding:10px 16px 40px;max-width:100%}}
"""


def pages(entries: list[Any], section: str = "") -> list[tuple[str, str]]:
    """Pages of the sidebar with their section, in order."""
    out = []
    for entry in entries:
        if isinstance(entry, str):
            out.append((entry, section))
        else:
            out += pages(entry["contents"], entry["section"]) if "contents" in entry else [(entry["href"], section)]
    return out


def title(page: Path) -> str:
    """The first heading of a page, or the title of its front matter."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "".join(nbformat.reads(text, 4).cells[0].source)
    return re.search(r"^(?:# |title: )(.+)$", text, flags=re.M)[1].strip()


def without_options(notebook: Any) -> Any:
    """Cells as a reader sees them: hidden ones gone, options gone, words on pictures."""
    notebook.cells = [c for c in notebook.cells if not re.match(r"#\|\s*(hide|default_exp)", c.source)]
    for cell in notebook.cells:
        if re.search(r"^#\|\s*echo:\s*false", cell.source, flags=re.M):
            cell.metadata["transient"] = {"remove_source": True}
        words = re.search(r"^#\|\s*fig-alt:\s*\"?(.*?)\"?$", cell.source, flags=re.M)
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in cell.source.split("\n") if not line.startswith("#|"))
            for output in cell.outputs if words else []:
                if "image/png" in output.get("data", {}):
                    output.metadata.setdefault("image/png", {})["alt"] = words[1]
    return notebook


def body(page: Path, exporter: HTMLExporter) -> str:
    """A page's content as HTML."""
    if page.suffix == ".md":
        text = page.read_text(encoding="utf-8")
        return f"<h1>{escape(title(page))}</h1>" + markdown2html(re.sub(r"\A---.*?---\n", "", text, flags=re.S))
    return exporter.from_notebook_node(without_options(nbformat.read(page, 4)))[0]


def write(folder: Path) -> list[Path]:
    """Every page under a folder, and the pictures that pages name."""
    listed = pages(yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])
    names, out = {name: title(NBS / name) for name, _ in listed}, []
    exporter = HTMLExporter(template_name="basic")
    shutil.copytree(NBS / "images", folder / "images", dirs_exist_ok=True)
    for name, _ in listed:
        up, links, last = "../" * name.count("/"), [], ""
        for other, section in listed:
            links += [f"<h2>{escape(section)}</h2>"] if section != last else []
            last = section
            links.append(f"<a{' class=here' if other == name else ''} href='{up}{Path(other).with_suffix('.html')}'>{escape(names[other])}</a>")
        content = re.sub(r'href="(?!https?:)([^"#]+)\.(?:ipynb|md)', r'href="\1.html', body(NBS / name, exporter))
        out.append(folder / Path(name).with_suffix(".html"))
        out[-1].parent.mkdir(parents=True, exist_ok=True)
        out[-1].write_text(
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(names[name])}</title><style>{STYLE}</style></head><body><nav>{''.join(links)}</nav><main>{content}</main></body></html>",
            encoding="utf-8")
    return out


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else NBS.parent / "_docs")
    print(f"{len(write(target))} pages; open {target / 'index.html'}")

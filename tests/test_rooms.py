"""The order of the rooms: a module imports only from rooms with lower numbers."""
import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def default_export(notebook: Path) -> str | None:
    """Module that a notebook exports to, as its `default_exp` line says."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for line in "".join(cell["source"]).splitlines():
            if cell["cell_type"] == "code" and line.replace(" ", "").startswith("#|default_exp"):
                return line.split()[-1]
    return None


def room_order() -> dict[str, str]:
    """Exported module to room number; the number is the notebook's file prefix, 35b after 35."""
    notebooks = [p for p in sorted((ROOT / "nbs").rglob("[0-9][0-9]*_*.ipynb")) if not any(x.startswith((".", "_")) for x in p.parts[len(ROOT.parts):])]
    return {"volcal." + module: p.name.split("_")[0] for p in notebooks if (module := default_export(p))}


def imported_modules(path: Path, module: str) -> set[str]:
    """volcal modules that a source file imports, at any depth of nesting, relative forms resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("volcal")}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if name.startswith("volcal"):
                found |= {name} | {f"{name}.{a.name}" for a in node.names}
    return found


def upward(importer: str, imported: set[str], order: dict[str, str]) -> list[str]:
    """Imports of a room that is not lower than the importer's own."""
    above = [m for m in sorted(imported) if m in order and m != importer and order[m] >= order[importer]]
    return [f"{importer} ({order[importer]}) imports {m} ({order[m]})" for m in above]


def test_no_import_runs_up_the_rooms():
    order = room_order()
    assert len(order) >= 20, f"only {len(order)} rooms were found, the walk is broken"
    wrong = []
    for module in order:
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"{module} is exported by a notebook and missing from volcal/"
        wrong += upward(module, imported_modules(path, module), order)
    assert not wrong, wrong


UPWARD = ["from volcal.ops.cli import app", "import volcal.ops.cli", "from ..ops import cli", "def f():\n    from volcal.ops import cli"]


@pytest.mark.parametrize("source", UPWARD)
def test_an_upward_import_is_seen(tmp_path, source):
    file = tmp_path / "chain.py"
    file.write_text(source)
    order = {"volcal.market.chain": "13", "volcal.ops.cli": "53"}
    assert upward("volcal.market.chain", imported_modules(file, "volcal.market.chain"), order)


def test_every_module_has_a_room():
    order = room_order()
    files = [p for p in (ROOT / "volcal").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")]
    modules = {"volcal." + ".".join(p.relative_to(ROOT / "volcal").with_suffix("").parts) for p in files}
    assert modules <= set(order), f"modules without a notebook: {sorted(modules - set(order))}"

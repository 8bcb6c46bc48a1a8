"""The package's floors: a module imports only from floors below its own, and data goes one way."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: {"files", "paths", "processes", "tables"},
    1: {
        "__init__",
        "config",
        "ending",
        "noise",
        "non_finite",
        "loss",
        "optimizer_state",
        "prompts",
        "runlog",
        "report",
    },
    2: {"data", "models", "checkpoint", "compute", "scorers", "cache", "tiny"},
    3: {"precompute", "step", "sampling", "selfplay", "study"},
    4: {"train_xdpo", "generate", "evaluate", "experiments"},
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
SIDEWAYS = {
    ("report", "data"),  # the one decoder of images
    ("scorers", "tiny"),  # the embedded judges' one way in
    ("tables", "files"),  # what a failing disk means
}
TENSORS_ONLY = {"noise", "loss"}

PACKAGE = sorted((ROOT / "xdpo").rglob("*.py"))
ENTRIES = [ROOT / f"{name}.py" for name in sorted(FLOORS[4]) if (ROOT / f"{name}.py").exists()]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


def imported_names(source, package=()):
    """Every absolute dotted name that the source imports, at any depth; `package` is where relative ones start."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports_of(path):
    return set(imported_names(path.read_text(), path.relative_to(ROOT).parent.parts))


def module_of(path):
    """`xdpo/tiny/world.py` → tiny, `xdpo/loss/xdpo.py` → loss, `generate.py` → generate."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if len(parts) == 1 else parts[1]


def own_modules(names):
    return {name.split(".")[1] for name in names if name.startswith("xdpo.")}


def relative_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE + ENTRIES, ids=relative_name)
def test_a_module_imports_only_from_floors_below(path):
    module = module_of(path)
    assert module in FLOOR_OF, f"xdpo/{module} stands on no floor: add it to the table here and to the architecture"
    names = imports_of(path)
    for other in own_modules(names) - {module}:
        assert other in FLOOR_OF, f"{relative_name(path)} imports xdpo.{other}, which stands on no floor"
        below = FLOOR_OF[other] < FLOOR_OF[module] and other != "tiny"
        assert below or (module, other) in SIDEWAYS, f"{relative_name(path)} may not import xdpo.{other}"
    outside = {name.split(".")[0] for name in names} & (FLOORS[4] | {"scripts"})
    assert not outside, f"{relative_name(path)} may not import {', '.join(sorted(outside))}: call it instead"


@pytest.mark.parametrize("path", SCRIPTS, ids=relative_name)
def test_a_script_imports_neither_another_script_nor_an_entry_point(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    forbidden = FLOORS[4] | {"scripts"} | {script.stem for script in SCRIPTS}
    assert not roots & forbidden, f"{relative_name(path)} imports {', '.join(sorted(roots & forbidden))}: call it"


@pytest.mark.parametrize("module", sorted(TENSORS_ONLY))
def test_the_mathematics_knows_tensors_only(module):
    for path in (path for path in PACKAGE if module_of(path) == module):
        names = {name for name in imports_of(path) if not name.startswith(f"xdpo.{module}")}
        assert {name.split(".")[0] for name in names} <= {"torch", "numpy"} | sys.stdlib_module_names


@pytest.mark.parametrize(
    "source, package",
    [
        ("import xdpo.step", ()),
        ("from xdpo import step", ()),
        ("from xdpo.step import run", ()),
        ("def later():\n    from . import step", ("xdpo",)),
        ("from ..step import run", ("xdpo", "tiny")),
    ],
)
def test_every_way_to_import_a_module_is_seen(source, package):
    assert own_modules(imported_names(source, package)) == {"step"}

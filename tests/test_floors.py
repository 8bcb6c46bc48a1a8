"""The package's floors: a module imports only from floors below its own, and data goes one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xdpo.loss import OBJECTIVES

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: {"arguments", "files", "loss", "paths", "processes", "progress", "provenance", "tables"},
    1: {"__init__", "batch", "config", "ending", "noise", "prompts", "runlog"},
    2: {"cache", "compute", "data", "families", "non_finite", "scorers", "tiny"},
    3: {"images", "models", "noisy", "precompute", "runs"},
    4: {"reference", "sampling", "scores"},
    5: {"recording", "report", "step"},
    6: {"dashboard", "learner", "study", "tally"},
    7: {"feeds", "find_batch", "watch"},
    8: {"experiments", "training"},
    9: {"train_xdpo", "generate", "evaluate"},
}
ENTRY_FLOOR = max(FLOORS)
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
SIDEWAYS = {
    ("report", "data"),  # the one decoder of images
    ("scorers", "tiny"),  # the embedded judges' one way in
    ("tables", "files"),  # what a failing disk means
}
TENSORS_ONLY = {"noise", "loss"}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "matplotlib"}
ON_A_CONFIG = {
    f"{program} {words}": [program, *words.split()]
    for program in (
        "train_xdpo.py",
        "scripts/cache_examples.py",
        "scripts/cache_reference.py",
        "scripts/inspect_data.py",
        "scripts/prepare_data.py",
    )
    for words in ("--help", "--config configs/tiny/xdpo.yaml loss.bta=1")
}
WITHOUT_HEAVY = {
    **ON_A_CONFIG,
    "train_xdpo.py --dry-run": ["train_xdpo.py", "--config", "configs/tiny/xdpo.yaml", "--dry-run"],
    "evaluate.py --help": ["evaluate.py", "--help"],
    "evaluate.py and a bad argument": ["evaluate.py", "--output", "x", "--batch-size", "0"],
    "evaluate.py and a model that isn't there": ["evaluate.py", "--images", "a", "--baseline", "b", "--output", "x"],
    "generate.py --help": ["generate.py", "--help"],
    "generate.py grid --help": ["generate.py", "grid", "--help"],
    "generate.py and a bad argument": ["generate.py", "--steps", "0"],
    "the foundations": ["-c", "import xdpo.files, xdpo.paths, xdpo.prompts, xdpo.scorers, xdpo.tables"],
}

PACKAGE = sorted((ROOT / "xdpo").rglob("*.py"))
ENTRIES = [ROOT / f"{name}.py" for name in sorted(FLOORS[ENTRY_FLOOR]) if (ROOT / f"{name}.py").exists()]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
PAGE = ROOT / "docs" / "architecture.md"


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


def defined_names(path):
    """Functions, classes, methods and assigned names of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def relative_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE + ENTRIES, ids=relative_name)
def test_a_module_imports_only_from_floors_below(path):
    module = module_of(path)
    assert module in FLOOR_OF, f"xdpo/{module} stands on no floor: add it to the table here and to docs/architecture.md"
    names = imports_of(path)
    for other in own_modules(names) - {module}:
        assert other in FLOOR_OF, f"{relative_name(path)} imports xdpo.{other}, which stands on no floor"
        below = FLOOR_OF[other] < FLOOR_OF[module] and other != "tiny"
        assert below or (module, other) in SIDEWAYS, f"{relative_name(path)} may not import xdpo.{other}"
    outside = {name.split(".")[0] for name in names} & (FLOORS[ENTRY_FLOOR] | {"scripts"})
    assert not outside, f"{relative_name(path)} may not import {', '.join(sorted(outside))}: call it instead"


@pytest.mark.parametrize("path", SCRIPTS, ids=relative_name)
def test_a_script_imports_neither_another_script_nor_an_entry_point(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    forbidden = FLOORS[ENTRY_FLOOR] | {"scripts"} | {script.stem for script in SCRIPTS}
    assert not roots & forbidden, f"{relative_name(path)} imports {', '.join(sorted(roots & forbidden))}: call it"


@pytest.mark.parametrize("module", sorted(TENSORS_ONLY))
def test_the_mathematics_knows_tensors_only(module):
    for path in (path for path in PACKAGE if module_of(path) == module):
        names = {name for name in imports_of(path) if not name.startswith(f"xdpo.{module}")}
        assert {name.split(".")[0] for name in names} <= {"torch", "numpy"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", PACKAGE + ENTRIES + SCRIPTS, ids=relative_name)
def test_one_module_alone_puts_files_in_place_and_asks_whether_it_may(path):
    if path == ROOT / "xdpo" / "files.py":
        return
    forbidden = {("os", "replace"), ("os", "rename"), ("os", "access"), ("shutil", "move")}
    attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    accessed = {(node.value.id, node.attr) for node in attributes if isinstance(node.value, ast.Name)}
    assert not accessed & forbidden, f"{relative_name(path)}: use xdpo.files for {accessed & forbidden}"


def test_the_page_on_the_architecture_shows_every_room_on_its_floor():
    shown = [
        (int(floor), room) for floor, room in re.findall(r"^\| (\d) \| \[`(\w+)`\]", PAGE.read_text(), re.MULTILINE)
    ]
    rooms = [(floor, room) for floor, rooms in FLOORS.items() for room in rooms if room != "__init__"]
    assert sorted(shown) == sorted(rooms)


def test_what_the_page_on_the_architecture_links_to_is_there():
    for name, target in re.findall(r"\[`([^`]+)`\]\(([^)#]+)", PAGE.read_text()):
        path = PAGE.parent / target
        assert path.exists(), f"{PAGE.name} links {name} to {target}, which is not there"
        if path.suffix == ".py" and "/" not in name and name != path.stem:
            assert name.split(".")[-1] in defined_names(path), f"{PAGE.name} links {name} to {target}: it is not there"


def test_no_objective_is_told_from_others_by_its_name():
    """What sets one apart stands in its declaration, so that a new one is a line there."""
    for path in (path for path in PACKAGE + ENTRIES + SCRIPTS if module_of(path) != "loss"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue):
                told = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & set(OBJECTIVES)
                assert not told, f"{relative_name(path)}:{node.lineno} compares with {told}: ask the objective"


@pytest.mark.parametrize("arguments", WITHOUT_HEAVY.values(), ids=WITHOUT_HEAVY)
def test_who_only_asks_waits_for_no_library(arguments):
    ended = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in ended.stderr.splitlines() if "|" in line}
    assert "xdpo" in imported and not imported & HEAVY, ended.stderr[-3000:]


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

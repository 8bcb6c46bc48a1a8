"""The package's declaration: pyproject.toml says what needs what, requirements.txt which versions the tests run on."""

import re
import sys
import tomllib

import pytest
from test_floors import ENTRIES, PACKAGE, ROOT, SCRIPTS, imports_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = PROJECT["optional-dependencies"]
NOT_PINNED = {"8bit", "wandb"}  # what few want, and what the tests do without
TESTS = [path for path in (ROOT / "tests").glob("*.py") if path.name != "make_metric_fixtures.py"]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "PyYAML"}
BROUGHT_ALONG = {"tokenizers": "transformers", "fsspec": "datasets"}


def test_the_pins_are_what_the_groups_need():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = [re.fullmatch(r"([\w-]+)==[\d.]+", line)[1] for line in lines]
    needed = {*PROJECT["dependencies"], *(name for group in GROUPS.keys() - NOT_PINNED for name in GROUPS[group])}
    assert sorted(pinned) == sorted(needed)


@pytest.mark.parametrize(
    "paths, groups",
    [
        (PACKAGE + ENTRIES + SCRIPTS, {"eval", "study", "8bit", "wandb"}),
        (TESTS, {"eval", "study", "dev"}),
    ],
    ids=["programs", "tests"],
)
def test_every_library_that_is_imported_is_declared(paths, groups):
    imported = {name.split(".")[0] for path in paths for name in imports_of(path)}
    own = {"xdpo", *(path.stem for path in ENTRIES + SCRIPTS + TESTS), *(path.parent.name for path in SCRIPTS)}
    libraries = imported - own - sys.stdlib_module_names
    declared = {*PROJECT["dependencies"], *(name for group in groups for name in GROUPS[group])}
    assert {DISTRIBUTIONS.get(name, BROUGHT_ALONG.get(name, name)) for name in libraries} <= declared

"""The pages: links lead somewhere, and commands name files and keys that are there."""

import re
import shlex
from pathlib import Path
from runpy import run_path

import pytest
import yaml

from xdpo.config import ConfigError, load_config
from xdpo.config.sections import KEYS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "assets/tiny/README.md",
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors_of(page):
    """The anchors that GitHub and mkdocs make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target}: there is no {found}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors_of(found), f"{target}: {found.name} has no such heading"


def commands_of(page):
    """The lines of a page's shell blocks, continued ones joined, without comments.

    Those on robust_dpo are left out: docs/adding_an_objective.md adds it first.
    """
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and "robust_dpo" not in line:
                yield words


@each_page
def test_commands_name_programs_and_configs_that_are_there_and_keys_that_exist(page):
    for words in commands_of(page):
        for word in words:
            if re.fullmatch(r"(scripts|configs)/[\w/.-]+\.(py|sh|yaml)|(train_xdpo|generate|evaluate)\.py", word):
                assert (ROOT / word).is_file(), f"{' '.join(words)}: there is no {word}"
        named = [word for word in words if re.fullmatch(r"configs/[\w/-]+\.yaml", word)]
        overrides = [word for word in words if word.partition("=")[0] in KEYS]
        for word in words:
            key = word.partition("=")[0]
            if "=" in word and re.fullmatch(r"[a-z_]+\.[a-z_0-9]+", key):
                assert key in KEYS, f"{' '.join(words)}: there is no key {key}"
        if named and any(word.endswith(("train_xdpo.py", "train_sd15.sh")) for word in words):
            try:
                load_config(ROOT / named[0], overrides)
            except ConfigError as error:
                pytest.fail(f"{' '.join(words)}: {error}")


def named_in(entry):
    """The pages of a part of mkdocs' navigation."""
    if isinstance(entry, str):
        return [entry]
    return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in named_in(part)]


def test_every_page_is_in_the_sites_navigation_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(named_in(site["nav"])) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize(
    "repository, expected",
    [
        ("https://example.org/r/", "[`a`](https://example.org/r/blob/HEAD/xdpo/a.py#L3) and [b](b.md), [c](b.md#c)"),
        ("", "`a` and [b](b.md), [c](b.md#c)"),
    ],
)
def test_links_out_of_the_pages_lead_to_the_repository_on_the_site(monkeypatch, repository, expected):
    hook = run_path(str(ROOT / "scripts/site_links.py"))["on_page_markdown"]
    monkeypatch.setenv("REPOSITORY_URL", repository)
    assert hook("[`a`](../xdpo/a.py#L3) and [b](b.md), [c](b.md#c)", page=None) == expected


def test_what_lints_before_a_commit_is_what_lints_in_the_tests():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    versions = {repository["repo"].rpartition("/")[2]: repository["rev"] for repository in hooks["repos"]}
    assert f"ruff=={versions['ruff-pre-commit'].removeprefix('v')}\n" in pins


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, f"docs/index.md doesn't list {page.name}"


def test_the_row_of_the_page_about_adding_one_is_one_of_the_list_of_variants():
    page = (ROOT / "docs/adding_an_objective.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^VARIANTS = \[\n    \.\.\.,\n(    .+\n)\]$", page, re.MULTILINE)
    assert eval(f"[{row}]", {"BETA": 40.0}) == [("robust_dpo", {"beta": 40.0, "flip_rate": 0.2})]

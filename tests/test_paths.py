"""A user's path: `~` everywhere, and names with brackets as they are."""

from pathlib import Path

import pytest

from xdpo.config import KEYS, load_config
from xdpo.paths import expanded, matching, user_path

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def names(paths):
    return [path.name for path in paths]


def test_the_home_folder_is_expanded_and_nothing_else(home):
    assert user_path("~/runs") == home / "runs"
    assert expanded("~") == str(home)
    for text in ("~nobody-is-called-so/x", "a~b", "./~", "owner/name", "", "a/~/b"):
        assert expanded(text) == text


def test_a_glob_matches_in_order_and_a_name_that_exists_is_no_glob(tmp_path, home):
    for name in ("data[1]/train-1.parquet", "data[1]/train-0.parquet", "data1/train-9.parquet", "x[0].png", "x0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(matching(f"{tmp_path}/data[1]/train-*.parquet")) == ["train-0.parquet", "train-1.parquet"]
    assert matching(f"{tmp_path}/data[1]") == [tmp_path / "data[1]"]
    assert names(matching(f"{tmp_path}/x[0].png")) == ["x[0].png"]
    assert names(matching(f"{tmp_path}/data[12]/*.parquet")) == ["train-9.parquet"], "a glob where nothing has the name"
    assert names(matching(f"{tmp_path}/**/train-9.parquet")) == ["train-9.parquet"]
    assert matching(f"{tmp_path}/none*") == matching("none*/x") == matching("a\0b") == []


def test_relative_globs_stay_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    assert matching("*.tar") == [Path("a.tar")]


def test_every_key_that_is_a_path_expands_the_home_folder(home, tmp_path):
    """In files and on the command line, in lists, and for the parent."""
    (tmp_path / "home").mkdir()
    (home / "parent.yaml").write_text(f"inherits: {ROOT}/configs/base.yaml\noutput_dir: ~/run\n")
    child = home / "child.yaml"
    child.write_text("inherits: ~/parent.yaml\ndata:\n  path: [~/a, '~/b-*.parquet']\n")
    keys = ["model.pipeline", "cache.examples", "cache.local_copy", "cache.reference", "eval.path"]
    config = load_config("~/child.yaml", [f"{key}=~/x" for key in keys])
    assert config.output_dir == str(home / "run")
    assert config.data.path == (str(home / "a"), str(home / "b-*.parquet"))
    for key in keys:
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == str(home / "x"), key
    about_places = ("path", "folder")
    told = [key for key, field in KEYS.items() if any(word in field.description for word in about_places)]
    assert set(told) - {"output_dir", "data.path", "data.source", *keys} == set(), "a new key that may be a path"


def test_command_lines_expand_the_home_folder(home):
    import generate
    from xdpo.images.reading import name_folders

    made = generate.build_parser().parse_args(["--model=~/m", "--lora=~/l", "--prompts", "x", "--output=~/images"])
    assert (made.model, made.lora, made.output) == (f"{home}/m", f"{home}/l", home / "images")
    assert name_folders(["ours=~/images"]) == {"ours": home / "images"}


def test_no_option_takes_a_path_with_its_sign_of_home():
    for file in [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        assert "type=Path" not in file.read_text(encoding="utf-8"), f"{file.name}: type=user_path expands ~"

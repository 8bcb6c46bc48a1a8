"""A user's path: `~` everywhere, and names with brackets as they are."""

import shutil
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
    keys = ["model.pipeline", "model.vae", "cache.examples", "cache.local_copy", "cache.reference", "eval.path"]
    config = load_config("~/child.yaml", [f"{key}=~/x" for key in keys])
    assert config.output_dir == str(home / "run")
    assert config.data.path == (str(home / "a"), str(home / "b-*.parquet"))
    for key in keys:
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == str(home / "x"), key
    online = ["online.prompts", "online.scorer_weights"]
    section = load_config("~/child.yaml", ["feed.name=online_pairs", *(f"{key}=~/x" for key in online)]).online
    assert section.prompts == section.scorer_weights == str(home / "x")
    about_places = ("path", "folder")
    told = [key for key, field in KEYS.items() if any(word in field.description for word in about_places)]
    others = {"output_dir", "data.path", "data.source", "cache.keep_source", "export.formats"}
    assert set(told) - {*others, *keys, *online} == set(), "a new key that may be a path"


def test_command_lines_expand_the_home_folder(home):
    import generate
    from xdpo.images.reading import name_folders

    made = generate.build_parser().parse_args(["--model=~/m", "--lora=~/l", "--prompts", "x", "--output=~/images"])
    assert (made.model, made.lora, made.output) == (f"{home}/m", f"{home}/l", home / "images")
    assert name_folders(["ours=~/images"]) == {"ours": home / "images"}


def test_names_of_scorers_prompts_and_folders_expand_the_home_folder_where_they_are_read(home, tmp_path):
    """Words that may be a name or a path: each is asked for as both."""
    from xdpo.models import read_model_spec
    from xdpo.prompts import load_prompts
    from xdpo.scorers.loading import scorer_version

    home.mkdir()
    (home / "red.py").write_text("class Red:\n    version = 'of home'\n    score = len\n")
    (home / "mine.txt").write_text("a cat\n")
    (home / "mine.yaml").write_text("base: ~/pipeline\nlora: ~/lora.safetensors\n")
    assert scorer_version(expanded("~/red.py:Red"), None) == "of home"
    assert load_prompts("~/mine.txt").prompts[0].text == "a cat"
    _, spec = read_model_spec(expanded("~/mine.yaml"))
    assert (spec.base, spec.lora) == (f"{home}/pipeline", f"{home}/lora.safetensors")
    with pytest.raises(ValueError, match=f"no folder '{home}/nothing' here"):
        read_model_spec(expanded("~/nothing"))


@pytest.mark.parametrize("name", ["relabel", "user_study", "train_tiny_judge", "compare_tiny", "rehearse", "reproduce"])
def test_options_of_scripts_that_name_files_expand_the_home_folder(name):
    """Those that are read by another function than argparse's are tested with it."""
    import ast

    read_elsewhere = {"--data", "--a", "--prompts", "--images", "--scale"}
    tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    options = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    about = ("folder", "file", "DIR", "FILE", "STUDY", "weights", "pipeline")
    assert options
    for option in options:
        words = [
            node.value for node in ast.walk(option) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        named = {keyword.arg: keyword.value for keyword in option.keywords}
        metavar = getattr(named.get("metavar"), "value", "")
        if words[0] in read_elsewhere or "action" in named or not ({metavar, words[0].strip("-")} & set(about)):
            continue
        assert getattr(named.get("type"), "id", "") in ("user_path", "expanded"), f"{name}.py {words[0]}"


def test_a_whole_run_in_folders_with_brackets(run, small_pairs, small_pipeline, tmp_path):
    """Run folder, data, held-out data, pipeline and all caches: none is taken for a pattern."""
    place = tmp_path / "of[1] *?"
    shutil.copytree(small_pipeline, place / "model[a]")
    shutil.copy(small_pairs, place / "train[0].parquet")
    decoy = tmp_path / "of1 ab"
    decoy.mkdir()
    (decoy / "train0.parquet").write_bytes(b"another")
    paths = {"model.pipeline": "model[a]", "data.path": "train[0].parquet", "eval.path": "train[0].parquet"}
    paths |= {"cache.examples": "cache[e]", "cache.local_copy": "copy[l]", "cache.reference": "errors[r]"}
    keys = [f"{key}='{place / name}'" for key, name in paths.items()]
    common = (
        *keys,
        "eval.every=2",
        "eval.draws=1",
        "train.max_steps=2",
        "checkpoint.every=1",
        "data.sample_latents=false",
    )
    for _ in range(2):
        status, folder = run("of[1] *?/run[1]", *common)
        assert status == 0
    assert len(list((folder / "checkpoints").iterdir())) >= 1 and (folder / "export" / "unet").is_dir()
    assert sorted(path.name for path in place.iterdir()) == sorted([*{*paths.values()}, "run[1]"])
    assert [path.name for path in decoy.iterdir()] == ["train0.parquet"]


def test_no_option_takes_a_path_with_its_sign_of_home():
    for file in [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        assert "type=Path" not in file.read_text(encoding="utf-8"), f"{file.name}: type=user_path expands ~"

"""Prompt sets: what is read from every kind of file, what is selected, and what is said when one is missing."""

import json
import pathlib

import pytest
from conftest import Answer

from xdpo import prompts
from xdpo.prompts import PROMPT_SETS, load_prompts
from xdpo.tiny.world import tiny_prompts

ROOT = pathlib.Path(__file__).resolve().parent.parent
PUBLISHED = ROOT.parent / "shared" / "data"
with_published_files = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published prompt files are not here")


def texts(prompt_set):
    return [prompt.text for prompt in prompt_set.prompts]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


# --- the sets that ship --------------------------------------------------------------------------------


def test_tinyprompts_is_what_the_embedded_world_says_it_is():
    loaded = load_prompts("tinyprompts")

    assert [(prompt.category, prompt.text) for prompt in loaded.prompts] == tiny_prompts()
    assert [prompt.index for prompt in loaded.prompts] == list(range(200))


def test_the_papers_figures_have_as_many_prompts_as_rows_and_columns():
    loaded = load_prompts("paper_figures")

    counts = {name: sum(prompt.category == name for prompt in loaded.prompts) for name in ("figure_1", "figure_5")}
    assert counts == {"figure_1": 30, "figure_5": 3}
    assert len(load_prompts("paper_figures", categories=["figure_A1", "figure_A2"]).prompts) == 12
    assert "A space man sat on a beach chair on the moon, pixel art." in texts(loaded)


@with_published_files
def test_the_papers_figures_are_prompts_of_the_hpsv2_benchmark():
    benchmark = json.loads((PUBLISHED / "hpsv2_benchmark_prompts.json").read_text())
    header, *lines = (ROOT / "assets" / "prompts" / "paper_figures.tsv").read_text().splitlines()

    assert header.split("\t") == ["figure", "prompt", "hpsv2_style", "hpsv2_index"]
    for line in lines:
        _, text, style, index = line.split("\t")
        assert benchmark[style][int(index)] == text


# --- the published sets --------------------------------------------------------------------------------


@with_published_files
def test_partiprompts_keeps_its_quotation_marks_and_counts():
    loaded = load_prompts("partiprompts", path=PUBLISHED / "PartiPrompts.tsv")

    assert len(loaded.prompts) == loaded.total == len(set(texts(loaded))) == 1632
    assert len({prompt.folder for prompt in loaded.prompts}) == 12
    assert sum(prompt.category == "Food & Beverage" for prompt in loaded.prompts) == 74
    assert any(text.startswith('"G I G G L E" painted') for text in texts(loaded))


@with_published_files
def test_hpsv2_is_the_same_from_one_file_and_from_the_hubs_four(cache):
    combined = load_prompts("hpsv2", path=PUBLISHED / "hpsv2_benchmark_prompts.json")
    (cache / "hpsv2").mkdir(parents=True)
    for style, lines in json.loads((PUBLISHED / "hpsv2_benchmark_prompts.json").read_text()).items():
        (cache / "hpsv2" / f"{style}.json").write_text(json.dumps(lines))

    assert load_prompts("hpsv2") == combined
    assert len(combined.prompts) == 3200 and len(set(texts(combined))) == 3172
    styles = ["anime", "concept-art", "paintings", "photo"]
    assert [prompt.category for prompt in combined.prompts[::800]] == styles
    assert [(prompt.folder, prompt.index) for prompt in combined.prompts[799:802]] == [
        ("anime", 799),
        ("concept-art", 0),
        ("concept-art", 1),
    ]


def test_a_download_is_whole_or_absent(cache, monkeypatch):
    source = prompts._Source("one prompt", {"a.txt": "https://example.org/a.txt"})
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer(b"a c", whole=False))
    with pytest.raises(ValueError, match="could not be fetched: IncompleteRead"):
        prompts._rows_of_set("one", source, None)
    assert not cache.exists()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer(b"a cat"))
    assert [text for _, text in prompts._rows_of_set("one", source, None).rows] == ["a cat"]
    assert [path.name for path in (cache / "one").iterdir()] == ["a.txt"]


def small_source(**changes):
    return prompts._Source("two prompts", {"a.json": "https://example.org/a.json"}, **changes)


def test_a_file_that_is_not_the_published_set_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('["one", "two"]')
    wrong = small_source(sha256="0" * 64)
    monkeypatch.setattr(prompts, "PROMPT_SETS", {"small": wrong})

    with pytest.raises(ValueError, match="is not two prompts: its content has the checksum"):
        load_prompts("small", path=tmp_path)


def test_a_set_is_looked_for_at_the_path_then_in_the_cache_then_at_its_source(tmp_path, cache, monkeypatch):
    places = {"path": tmp_path / "path", "cache": cache / "small", "source": tmp_path / "source"}
    for name, folder in places.items():
        folder.mkdir(parents=True)
        (folder / "a.json").write_text(json.dumps([name]))
    source = prompts._Source("one prompt", {"a.json": (places["source"] / "a.json").as_uri()})
    monkeypatch.setattr(prompts, "PROMPT_SETS", {"small": source})
    monkeypatch.delenv("HF_HUB_OFFLINE")

    assert texts(load_prompts("small", path=places["path"])) == ["path"]
    assert texts(load_prompts("small")) == ["cache"]
    (cache / "small" / "a.json").unlink()
    assert texts(load_prompts("small")) == ["source"]
    (places["source"] / "a.json").unlink()
    assert texts(load_prompts("small")) == ["source"], "what was fetched is in the cache now"
    assert [path.name for path in (cache / "small").iterdir()] == ["a.json"]


def test_a_set_that_cannot_be_fetched_names_the_files_and_where_to_place_them(cache):
    with pytest.raises(ValueError, match="could not be fetched") as refused:
        load_prompts("hpsv2")

    message = str(refused.value)
    assert "anime.json, concept-art.json, paintings.json, photo.json" in message
    assert str(cache / "hpsv2") in message and "huggingface.co/datasets/zhwang/HPDv2" in message


# --- files of one's own --------------------------------------------------------------------------------

FILES = {
    "a.txt": "one\r\ntwo, “three”\n\n",
    "a.csv": 'Prompt,Style\n"one",x\n"two, “three”",y\n',
    "a.tsv": "caption\tcategory\none\tx\ntwo, “three”\ty\n",
    "list.json": '["one", "two, “three”"]',
    "objects.json": '[{"prompt": "one"}, {"text": "two, “three”", "category": "y"}]',
    "by_id.json": '{"17": "one", "4": {"prompt": "two, “three”"}}',
    "by_category.json": '{"x": ["one"], "y": ["two, “three”"]}',
    "a.jsonl": '{"prompt": "one"}\n\n"two, “three”"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_its_prompts_in_order(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name].encode())

    loaded = load_prompts(str(tmp_path / name))

    assert texts(loaded) == ["one", "two, “three”"]
    assert loaded.name == name.partition(".")[0]
    assert [prompt.position for prompt in loaded.prompts] == [0, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FILES)
def test_unicode_with_a_byte_order_mark_gives_the_same_prompts(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(FILES[name].encode(encoding))
    assert texts(load_prompts(str(tmp_path / name))) == ["one", "two, “three”"]


def test_a_parquet_column_of_numbers_is_no_prompt(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": [1.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet row 0: column prompt must hold text, got 1\.0"):
        load_prompts(str(tmp_path / "a.parquet"))


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("one\n")
    assert texts(load_prompts("~/mine.txt")) == ["one"]


def test_a_parquet_file_gives_its_captions(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"jpg_0": [b"", b""], "caption": ["one", None], "num": [1, 2]})
    pq.write_table(table, tmp_path / "test_unique.parquet")

    assert texts(load_prompts(str(tmp_path / "test_unique.parquet"))) == ["one", ""]
    assert texts(load_prompts("pickapic_test_unique", path=tmp_path)) == ["one", ""]


def test_lists_by_category_are_numbered_within_each_and_a_table_throughout(tmp_path):
    (tmp_path / "lists.json").write_text('{"x": ["a", "b"], "y": ["c"]}')
    (tmp_path / "table.tsv").write_text("prompt\tcategory\na\tx\nb\tx\nc\ty\n")

    assert [prompt.index for prompt in load_prompts(str(tmp_path / "lists.json")).prompts] == [0, 1, 0]
    assert [prompt.index for prompt in load_prompts(str(tmp_path / "table.tsv")).prompts] == [0, 1, 2]


def test_categories_become_folder_names_that_differ(tmp_path):
    (tmp_path / "a.json").write_text('{"Food & Beverage": ["a"], "concept-art": ["b"], "../.": ["c"]}')
    (tmp_path / "b.json").write_text('{"a b": ["a"], "a_b": ["b"]}')

    folders = [prompt.folder for prompt in load_prompts(str(tmp_path / "a.json")).prompts]
    assert folders == ["food_beverage", "concept-art", "all"]
    with pytest.raises(ValueError, match="would share the folder 'a_b'"):
        load_prompts(str(tmp_path / "b.json"))


BAD_FILES = {
    "no such column": ("a.csv", "image,label\n1,2\n", "one must be prompt or caption or text"),
    "a row too short": ("a.tsv", "prompt\tcategory\nonly\n", "line 2 has 1 columns, the header 2"),
    "not JSON": ("a.json", "{", "line 1 is not JSON"),
    "not UTF-8": ("a.txt", b"one\ncaf\xe9\n", "line 2: byte 7 \\(0xe9\\) is no UTF-8 text"),
    "half of UTF-16": ("a.txt", b"\xff\xfe\x00", "line 1: byte 2 \\(0x00\\) is no UTF-16 text"),
    "a comma without quotation marks": (
        "a.csv",
        "prompt,style\na cat, 8k,photo\n",
        "line 2 has 3 columns, the header 2",
    ),
    "rows merged by a quotation mark": (
        "a.csv",
        'prompt,style\none,x\n"two,x\nthree",x\nfour,x\n',
        "lines 3 to 4: a cell begins with a quotation mark",
    ),
    "Excel's semicolons": ("a.csv", "prompt;style\na cat;photo\n", "parted by semicolons"),
    "two columns of prompts": ("a.csv", "prompt,Prompt\na,b\n", "several columns called 'prompt'"),
    "a category twice": ("a.json", '{"x": ["a"], "x": ["b"]}', "the key 'x' more than once"),
    "NaN": ("a.jsonl", '{"prompt": "a"}\n{"prompt": NaN}\n', "line 2: every prompt must be a string.*got"),
    "a list of prompts in one": ("a.jsonl", '{"prompt": ["a", "b"]}\n', "line 1: every prompt must be a string"),
    "half a surrogate pair": ("a.json", '["a", "\\ud83d"]', "prompt 1 holds half a character"),
    "a category that is a list": (
        "a.json",
        '[{"prompt": "a", "category": ["b"]}]',
        "prompt 0: its category must hold text",
    ),
    "NUL": ("a.txt", "one\ntwo\0\n", "line 2 holds a NUL byte"),
    "numbers": ("a.json", "[1, 2]", "every prompt must be a string"),
    "a string": ("a.json", '"a"', "must be a list of prompts"),
    "empty": ("a.txt", "", "is empty"),
    "not parquet": ("a.parquet", "text", "not a readable parquet file"),
    "another suffix": ("a.docx", "text", "can't read prompts from .docx"),
    "a set's name": ("hpsv2.txt", "text", "can't be called 'hpsv2'"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_without_prompts_is_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ValueError, match=message) as refused:
        load_prompts(str(path))
    assert path.stem in str(refused.value)


# --- selecting -----------------------------------------------------------------------------------------


def test_a_selection_keeps_every_prompts_position_and_number():
    whole = {prompt.position: prompt for prompt in load_prompts("tinyprompts").prompts}
    chosen = load_prompts("tinyprompts", categories=["relation", "two colours"], sample=10, sample_seed=3, limit=7)

    assert len(chosen.prompts) == 7
    assert all(whole[prompt.position] == prompt for prompt in chosen.prompts)
    assert {prompt.category for prompt in chosen.prompts} == {"relation", "two colours"}
    assert chosen.selection == {"categories": ["relation", "two colours"], "sample": 10, "sample_seed": 3}


def test_a_sample_is_the_same_every_time_another_for_another_seed_and_part_of_a_larger_one():
    def positions(size, seed):
        return [prompt.position for prompt in load_prompts("tinyprompts", sample=size, sample_seed=seed).prompts]

    assert positions(5, 0) == [15, 44, 46, 87, 192]  # fixed for good: a user study names its prompts by this
    assert positions(100, 0) == sorted(positions(100, 0)) != positions(100, 1)
    assert set(positions(5, 0)) < set(positions(100, 0))


def test_the_checksum_is_that_of_the_whole_set():
    assert load_prompts("tinyprompts", limit=1).sha256 == load_prompts("tinyprompts").sha256
    assert load_prompts("tinyprompts").sha256 != load_prompts("paper_figures").sha256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "hpsv3"}, "did you mean 'hpsv2'"),
        ({"name_or_path": "partiprompt"}, "choose from " + ", ".join(PROMPT_SETS)),
        ({"name_or_path": "nowhere.txt"}, "no prompt file 'nowhere.txt' here"),
        ({"name_or_path": "tinyprompts", "categories": ["relations"]}, "did you mean 'relation'"),
        ({"name_or_path": "tinyprompts", "sample": 201}, "cannot sample 201 of 200"),
        ({"name_or_path": "tinyprompts", "limit": 0}, "limit of 0"),
        ({"name_or_path": "hpsv2", "path": "nowhere.json"}, "no prompt file 'nowhere.json' here"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(**arguments)


def test_a_folder_without_the_files_is_refused_by_their_names(tmp_path):
    with pytest.raises(ValueError, match=r"lacks anime.json, .* \(or hpsv2_benchmark_prompts.json\)"):
        load_prompts("hpsv2", path=tmp_path)

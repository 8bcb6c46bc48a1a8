"""Tables and texts as users bring them: read right, or refused with file and line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xdpo.tables import TableError, as_text, read_json, read_json_lines, read_table, read_text

ROWS = [{"image": "a.png", "caption": "café, 8k"}, {"image": "b.png", "caption": 'a 5" nail'}]
CSV = 'image,caption\na.png,"café, 8k"\nb.png,"a 5"" nail"\n'
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path):
    table = read_table(path)
    return [dict(zip(table.names, cells, strict=True)) for cells in zip(*map(table.texts, table.names), strict=True)]


# --- what is right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.tsv"])
def test_unicode_with_a_mark_and_every_line_end_is_read(tmp_path, name, line_end, encoding):
    text = {"a.csv": CSV, "a.jsonl": JSONL, "a.tsv": 'image\tcaption\na.png\tcafé, 8k\nb.png\ta 5" nail\n'}[name]
    path = write(tmp_path / name, text.replace("\n", line_end).encode(encoding))
    assert rows_of(path) == ROWS


def test_utf16_of_either_order_is_read(tmp_path):
    for name, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        assert read_text(write(tmp_path / "a.txt", mark + "é\r\n".encode(name))) == "é\n"


def test_quoted_cells_may_hold_commas_quotation_marks_and_lines(tmp_path):
    """Also lines with as many commas as the table has: these are no rows."""
    captions = ["one, two", 'say "hi"', "first line\nsecond, line", "first\nlast,one", "", "a\u2028b", " padded "]
    lines = [f'{place}.png,"{caption.replace(chr(34), chr(34) * 2)}"\n' for place, caption in enumerate(captions)]
    path = write(tmp_path / "a.csv", "image,caption\n\n" + "".join(lines) + "\n")
    assert read_table(path).texts("caption") == captions
    assert read_table(path).numbers == [3, 4, 5, 7, 9, 10, 11]


def test_quotation_marks_within_a_cell_need_no_quoting(tmp_path):
    path = write(tmp_path / "a.csv", 'image,caption\na.png,a 5" nail and "another"\n')
    assert read_table(path).texts("caption") == ['a 5" nail and "another"']


def test_null_and_nan_are_missing_and_numbers_may_be_text(tmp_path):
    lines = '{"a": null, "b": "1.5"}\n{"a": NaN, "b": true}\n{"b": ""}\n{"a": "nan", "b": 2}\n'
    table = read_table(write(tmp_path / "a.jsonl", lines))
    assert table.texts("a") == [None, None, None, "nan"]
    assert table.floats("b") == [1.5, 1.0, None, 2.0]
    assert table.scalars("b") == ["1.5", "True", "", "2"]


def test_of_a_parquet_file_only_wanted_columns_are_read(tmp_path):
    pq.write_table(pa.table({"caption": ["x", None], "other": [1, 2]}), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", wanted=lambda name: name == "caption")
    assert table.texts("caption") == ["x", None]
    assert table.rows[0] == {"caption": "x"} and list(table.names) == ["caption", "other"]


def test_columns_that_nobody_asks_for_may_be_called_alike(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "note,caption,note\n1,x,2\n"))
    assert table.texts("caption") == ["x"]


# --- what is refused -----------------------------------------------------------------------------------

REFUSED = {
    "an unquoted comma": (
        "a.csv",
        "image,caption\na.png,a cat, 8k\n",
        r"line 2 has 3 columns, the header 2 \(image, c",
    ),
    "an unquoted line break": ("a.csv", "image,caption\na.png,a\ncat\n", r"line 3 has 1 columns"),
    "a row too long with the text cut": ("a.csv", "caption\na cat, 8k\n", r"line 2 has 2 columns"),
    "a tab in a TSV": ("a.tsv", "image\tcaption\na.png\ta\tcat\n", r"line 2 has 3 columns.*tabs"),
    "a mark that is never closed": ("a.csv", 'image,caption\na.png,"a cat\nb.png,dog\n', r"lines 2 to 3: .*mark"),
    "a mark that closes in the next row": (
        "a.csv",
        'image,caption\nz.png,first\na.png,"unclosed\nb.png,a 5"\nc.png,last\n',
        r"lines 3 to 4: .*one row of all",
    ),
    "a mark that closes two rows on": (
        "a.csv",
        'number,caption,style\n1,"unclosed,photo\n2,plain,photo\n3,a 5",anime\n4,last,anime\n',
        r"lines 2 to 4: .*one row of all",
    ),
    "marks that are not doubled": ("a.csv", 'image,caption\na.png,"a "small" cat"\n', r"line 2: .*small"),
    "semicolons": ("a.csv", "image;caption\na.png;a cat\n", r"a\.csv: its columns are parted by semicolons.*Excel"),
    "Excel's sep line": ("a.csv", "sep=,\nimage,caption\na.png,x\n", r"first line is Excel's 'sep='"),
    "tabs in a CSV": ("a.csv", "image\tcaption\na.png\tx\n", r"parted by tabs"),
    "commas in a TSV": ("a.tsv", "image,caption\na.png,x\n", r"parted by commas"),
    "two columns of one name": ("a.csv", "caption,caption\nx,y\n", r"several columns called 'caption'"),
    "a key twice": (
        "a.jsonl",
        '{"a": 1}\n{"caption": "x", "caption": "y"}\n',
        r"line 2: .*the key 'caption' more than",
    ),
    "Windows-1252": ("a.csv", "image,caption\r\na.png,café\r\n".encode("cp1252"), r"line 2: byte 24 \(0xe9\).*UTF-8"),
    "damaged UTF-8 with a mark": ("a.csv", b"\xef\xbb\xbfcaption\n\xff\n", r"line 2: byte 11 \(0xff\)"),
    "UTF-16 without a mark": ("a.csv", "caption\nx\n".encode("utf-16-le"), r"line 1 holds a NUL byte.*UTF-16"),
    "UTF-16 that is cut": ("a.csv", "caption\nxy".encode("utf-16")[:-1], r"line 2: byte 20 .*UTF-16"),
    "a NUL byte": ("a.jsonl", b'{"caption": "a\0b"}\n', r"line 1 holds a NUL byte"),
    "an escaped NUL": ("a.jsonl", '\n{"caption": "a\\u0000b"}\n', r"line 2: column caption holds the character NUL"),
    "half a surrogate pair": ("a.jsonl", '{"caption": "a \\ud83d b"}\n', r"line 1: column caption holds half a char"),
    "a number": (
        "a.jsonl",
        '{"caption": "x"}\n{"caption": 42}\n',
        r"line 2: column caption must hold text, got 42; a n",
    ),
    "a list": ("a.jsonl", '{"caption": ["a", "b"]}\n', r"line 1: column caption must hold text, got \['a', 'b'\]"),
    "an object": ("a.jsonl", '{"caption": {"en": "a"}}\n', r"line 1: column caption must hold text"),
    "a boolean": ("a.jsonl", '{"caption": true}\n', r"line 1: column caption must hold text, got True"),
    "no object": ("a.jsonl", '{"caption": "x"}\n["caption"]\n', r"line 2 must be an object .*got \['caption'\]"),
    "JSON over several lines": (
        "a.jsonl",
        '{\n"caption": "x"}\n',
        r"line 1 is not JSON: .*one whole object on each line",
    ),
    "a list in a file of lines": ("a.jsonl", '[\n{"caption": "x"}\n]\n', r"line 1 is not JSON: .*one whole object"),
    "endless digits": ("a.jsonl", '{"caption": ' + "9" * 5000 + "}\n", r"line 1 is not JSON that can be read"),
    "endless nesting": ("a.jsonl", "[" * 100_000 + "\n", r"line 1 is not JSON"),
    "no parquet": ("a.parquet", "caption\nx\n", r"a\.parquet is not a readable parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_read_wrong_is_refused_with_file_and_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(TableError, match=message) as refused:
        read_table(path).texts("caption")
    assert str(path) in str(refused.value)


def test_numbers_that_are_none_are_named(tmp_path):
    for value in ('"left"', "[1]", '{"a": 1}'):
        path = write(tmp_path / "a.jsonl", f'{{"label": 1}}\n{{"label": {value}}}\n')
        with pytest.raises(TableError, match=r"a\.jsonl line 2: column label must hold numbers, got"):
            read_table(path).floats("label")


def test_a_parquet_column_of_another_type_is_named_with_its_row(tmp_path):
    pq.write_table(pa.table({"caption": [1.5, 2.5]}), tmp_path / "a.parquet")
    with pytest.raises(TableError, match=r"a\.parquet row 0: column caption must hold text, got 1\.5"):
        read_table(tmp_path / "a.parquet").texts("caption")


def test_parquet_text_that_is_no_utf8_is_refused(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"caption": broken}), tmp_path / "a.parquet")
    with pytest.raises(TableError, match=r"a\.parquet is not a readable parquet file: .*utf-8"):
        read_table(tmp_path / "a.parquet")


def test_json_errors_have_the_line_of_the_file(tmp_path):
    with pytest.raises(TableError, match=r"a\.json line 3 is not JSON: .* at column 1"):
        read_json(write(tmp_path / "a.json", '{\r\n"a": 1,\r\n}'))
    with pytest.raises(TableError, match=r"a\.json: an object has the key 'a' more than once"):
        read_json(write(tmp_path / "a.json", '{"b": {"a": 1, "a": 2}}'))


def test_empty_lines_count_and_separators_of_unicode_do_not_end_any(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"a": "x\u2028y\x85z"}\n\n  \n["b"]')
    assert list(read_json_lines(path)) == [(2, {"a": "x\u2028y\x85z"}), (5, ["b"])]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl", "prompts.tsv", "train.parquet"])
def test_a_pointer_of_git_lfs_is_told_from_a_table(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n")
    with pytest.raises(TableError, match=rf"{name}.*: it is Git LFS's pointer .* run git lfs pull"):
        read_table(tmp_path / name)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"could not read .*a\.csv"):
        read_table(tmp_path / "a.csv")


def test_as_text_keeps_what_is_text():
    for text in ("", "nan", "None", "1", "a\u0000"[:1], "👍"):
        assert as_text(text, "here") == text

"""Tables of examples: what is read of them, and what each fault is told as."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from bert_fast.tasks import DataError
from bert_fast.tasks.data.tables import Role, number_in, read_table, text_in

TEXT = Role("text", ("sentence", "review"))
PAIR = Role("pair", ("sentence2",), is_required=False)
LABEL = Role("label", ("class",))
ROLES = (TEXT, PAIR, LABEL)


def save(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def values(file: Path, columns: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_table(file, ROLES, columns)]


ROWS = [{"text": "a film", "label": "good"}, {"text": 'so "dull"', "label": "bad"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'text\tlabel\na film\tgood\nso "dull"\tbad\n'),
        ("a.tsv", 'label\tother\tsentence\r\ngood\t1\ta film\r\n\r\nbad\t2\tso "dull"'),
        ("a.TSV", '\ufeffText\tLabel\na film\tgood\n  \nso "dull"\tbad\n\n'),
        ("a.csv", 'review,class\na film,good\n"so ""dull""",bad\n'),
        ("a.csv", '"class","review"\n\n"good","a film"\n   \n"bad","so ""dull"""\n'),
        ("a.jsonl", '{"text": "a film", "label": "good", "pair": null}\n\n{"label": "bad", "text": "so \\"dull\\""}'),
        ("a.tsv.gz", gzip.compress(b'text\tlabel\na film\tgood\nso "dull"\tbad\n', mtime=0)),
        ("a.csv.xz", lzma.compress(b'text,label\na film,good\n"so ""dull""",bad\n')),
    ],
)
def test_layouts(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert values(save(tmp_path, name, content)) == ROWS


def test_the_name_before_the_aliases(tmp_path: Path) -> None:
    file = save(tmp_path, "a.tsv", "review\tclass\ttext\tsentence\n1\t2\t3\t4\n")
    assert values(file) == [{"text": "3", "label": "2"}]
    assert values(file, {"text": "sentence", "label": "review"}) == [{"text": "4", "label": "1"}]


@pytest.mark.parametrize("columns", [{"text": "3", "label": "1"}, {"text": 3, "label": 1}])
def test_columns_by_number(columns: dict[str, Any], tmp_path: Path) -> None:
    file = save(tmp_path, "a.tsv", "good\t7\ta film\nbad\t8\tdull\n")
    assert values(file, columns) == [{"text": "a film", "label": "good"}, {"text": "dull", "label": "bad"}]


def test_lines_within_quotes(tmp_path: Path) -> None:
    file = save(tmp_path, "a.csv", 'text,label\n"two\nlines",x\n\n"a, b",y\n,z\n')
    rows = list(read_table(file, ROLES))
    assert [(row.line, row.values["text"]) for row in rows] == [(2, "two\nlines"), (5, "a, b"), (6, "")]
    assert rows[0].place == f"{file}:2"
    with pytest.raises(DataError, match=r"a\.csv:6: text is empty$"):
        text_in(rows[2], "text")


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.txt", "text\n", {}, "a.txt: no known suffix; it must be .tsv, .csv or .jsonl"),
        ("a.tsv", "", {}, "a.tsv: no rows"),
        ("a.tsv", "text\tlabel\n\n", {}, "a.tsv: no rows"),
        ("a.jsonl", "\n", {}, "a.jsonl: no rows"),
        (
            "a.tsv",
            "words\tlabel\nx\ty\n",
            {},
            "a.tsv:1: no column text or sentence or review; there are 'words', 'label'",
        ),
        ("a.tsv", "text\tlabel\nx\ty\n", {"pair": "b"}, "a.tsv:1: no column b; there are 'text', 'label'"),
        ("a.tsv", "text\tlabel\nx\ty\nx\n", {}, "a.tsv:3: 1 field; the first line has 2"),
        ("a.tsv", "text\tlabel\nx\ty\tz\n", {}, "a.tsv:2: 3 fields; the first line has 2"),
        ("a.csv", "text,label\nx,y\n\na, b, c\n", {}, "a.csv:4: 3 fields; the first line has 2"),
        ("a.csv", 'text,label\nx,y\n"a,b\nc,d\n', {}, "a.csv:3: no CSV (unexpected end of data)"),
        ("a.csv", 'text,label\n"a"b,c\n', {}, "a.csv:2: no CSV ("),
        ("a.tsv", "text\tlabel\ttext\nx\ty\tz\n", {}, "a.tsv:1: two columns are named 'text'"),
        ("a.tsv", "x\ty\n", {"text": "1", "label": "3"}, "a.tsv:1: no column 3, which is to be label; there are 2"),
        ("a.tsv", "x\ty\n", {"text": "0", "label": "1"}, "a.tsv:1: no column 0, which is to be text; there are 2"),
        ("a.tsv", "Sentence\tLabel\nx\ty\n", {"text": "1", "label": "2"}, "a.tsv:1: these are the columns' names"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}\n', {}, "a.jsonl:2: no column label or class"),
        ("a.jsonl", '{"text": "x"\n', {}, "a.jsonl:1: no JSON ("),
        ("a.jsonl", "[" * 100_000 + "\n", {}, "a.jsonl:1: no JSON ("),
        ("a.jsonl", '["x", "y"]\n', {}, "a.jsonl:1: a list; an object is needed"),
        ("a.jsonl", "7\n", {}, "a.jsonl:1: a number; an object is needed"),
        ("a.tsv", b"text\tlabel\n\xff\ty\n", {}, "a.tsv:2: not UTF-8 at byte 0"),
        ("a.tsv", b"text\tlabel\nx\0\ty\n", {}, "a.tsv:2: NUL character"),
        ("a.tsv.gz", gzip.compress(b"text\tlabel\nx\ty\n", mtime=0)[:-9], {}, "a.tsv.gz:"),
    ],
)
def test_faults(name: str, content: str | bytes, columns: dict[str, str], message: str, tmp_path: Path) -> None:
    file = save(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        values(file, columns)
    assert str(error.value).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": "text"}, "column 'words' is unknown; there are text, pair, label"),
        ({"text": "1", "label": "class"}, "either all of them are numbers or all are names"),
        ({"text": "1"}, "columns have numbers, but none for label, which is needed"),
    ],
)
def test_columns_that_cannot_be(columns: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        values(save(tmp_path, "a.tsv", "text\tlabel\nx\ty\n"), columns)


def test_numbers_need_a_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl is \.jsonl, whose fields have names"):
        values(save(tmp_path, "a.jsonl", '{"text": "x", "label": 1}\n'), {"text": "1", "label": "2"})


@pytest.mark.parametrize("empty", ["\t\n", "\t7\n", " \t7\n"])
def test_a_row_of_tabs_is_no_blank_line(empty: str, tmp_path: Path) -> None:
    (row,) = read_table(save(tmp_path, "a.tsv", f"text\tlabel\n{empty}"), ROLES)
    with pytest.raises(DataError, match=r"a\.tsv:2: text is empty"):
        text_in(row, "text")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "text is a number; a string is needed"),
        (None, "text is null; a string is needed"),
        (["x"], "text is a list; a string is needed"),
        (True, "text is a truth value; a string is needed"),
        (" \t", "text is empty"),
    ],
)
def test_texts(value: object, message: str, tmp_path: Path) -> None:
    (row,) = read_table(save(tmp_path, "a.jsonl", json.dumps({"text": value, "label": 1})), ROLES)
    with pytest.raises(DataError, match=rf"a\.jsonl:1: {message}"):
        text_in(row, "text")


@pytest.mark.parametrize(("value", "number"), [("3", 3.0), (" -2.5e1 ", -25.0), (0.5, 0.5), (7, 7.0)])
def test_numbers(value: object, number: float, tmp_path: Path) -> None:
    (row,) = read_table(save(tmp_path, "a.jsonl", json.dumps({"text": "x", "label": value})), ROLES)
    assert number_in(row, "label") == number


@pytest.mark.parametrize("value", ["", "x", "nan", "-inf", None, True, [1], float("nan")])
def test_what_is_no_number(value: object, tmp_path: Path) -> None:
    (row,) = read_table(save(tmp_path, "a.jsonl", json.dumps({"text": "x", "label": value})), ROLES)
    with pytest.raises(DataError, match=r"a\.jsonl:1: label is .*; a finite number is needed"):
        number_in(row, "label")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        values(tmp_path / "a.tsv")


# ---- columns that may be missing, or could be several ---------------------------------------------------------------


GOLD = Role("label", ("class",), is_required=False, is_needed_if_named=False)


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.tsv", "text\na film\n", {"label": "gold"}),
        ("a.csv", "a film\n", {"text": "1", "label": "2"}),
        ("a.jsonl", '{"text": "a film"}', {"label": "gold"}),
    ],
)
def test_an_answer_may_be_missing_though_it_is_named(
    name: str, content: str, columns: dict[str, str], tmp_path: Path
) -> None:
    file = save(tmp_path, name, content)
    assert [dict(row.values) for row in read_table(file, (TEXT, GOLD), columns)] == [{"text": "a film"}]
    with pytest.raises(DataError, match=r"no column (gold|2)"):
        list(read_table(file, ROLES, columns))


def test_several_names_of_one_role(tmp_path: Path) -> None:
    """GLUE's QNLI: one of both alone would be half of it."""
    role = Role("text", ("sentence", "question"), has_one_name=True)
    file = save(tmp_path, "a.tsv", "index\tquestion\tsentence\n0\twhy?\tso\n")
    with pytest.raises(DataError, match=r"a\.tsv:1: columns sentence and question could be text; --column text=NAME"):
        list(read_table(file, (role,)))
    (row,) = read_table(file, (role,), {"text": "question"})
    assert row.values == {"text": "why?"}
    file = save(tmp_path, "b.tsv", "text\tquestion\tsentence\na\twhy?\tso\n")
    assert [row.values for row in read_table(file, (role,))] == [{"text": "a"}]


def test_long_fields_of_csv(tmp_path: Path) -> None:
    text = "word " * 40_000
    file = save(tmp_path, "a.csv", f'text,label\n"{text}",good\n')
    assert values(file) == [{"text": text, "label": "good"}]


def test_half_of_a_character(tmp_path: Path) -> None:
    whole, half = r'{"text": "a \ud83d\ude00", "label": "b"}', r'{"text": "a", "label": ["\ud83d"]}'
    file = save(tmp_path, "a.jsonl", f"{whole}\n{half}\n")
    rows = read_table(file, ROLES)
    assert next(rows).values["text"] == "a \U0001f600"
    with pytest.raises(DataError, match=r"a\.jsonl:2: label has half a surrogate pair"):
        next(rows)

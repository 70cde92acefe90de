"""Reading a corpus: formats, packings, what is skipped and named, sentences."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast import lines
from bert_fast.pretraining import readers
from bert_fast.pretraining.corpus import (
    CorpusError,
    Problem,
    documents_of,
    find_files,
    read_documents,
    refuse,
    split_sentences,
)

DOCUMENTS = [["One line.", "Zwei: größer"], ["a\u2028b \x85 c"], ["x", "y", "z"]]

PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def txt(documents: list[list[str]]) -> bytes:
    return ("\n\n".join("\n".join(lines) for lines in documents) + "\n").encode()


def jsonl(documents: list[list[str]]) -> bytes:
    return "".join(json.dumps({"id": 7, "text": "\n\n".join(lines)}) + "\n" for lines in documents).encode()


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def write_parquet(file: Path, values: list[Any], kind: str = "string", name: str = "text") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(values, pyarrow.list_(pyarrow.string()) if kind == "list" else getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"other": list(range(len(values))), name: column}), file, row_group_size=2)
    return file


def read(file: Path, field: str = "text") -> tuple[list[list[str]], list[Problem]]:
    problems: list[Problem] = []
    return list(read_documents(file, field=field, on_problem=problems.append)), problems


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_formats(tmp_path: Path, kind: str, packing: str) -> None:
    content = {".txt": txt, ".jsonl": jsonl}[kind](DOCUMENTS)
    file = write(tmp_path / f"some.name{kind}{packing}", PACKINGS[packing](content))
    assert read(file) == (DOCUMENTS, [])


@pytest.mark.parametrize("kind", ["string", "large_string", "list"])
def test_parquet(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROWS", 2)
    values = DOCUMENTS if kind == "list" else ["\n".join(lines) for lines in DOCUMENTS]
    assert read(write_parquet(tmp_path / "a.parquet", values, kind)) == (DOCUMENTS, [])


def test_json_lists(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"body": ["a ", "", "b\\r\\nc"]}\n\n{"body": []}\n{"body": "d"}')
    assert read(file, "body") == ([["a", "b", "c"], ["d"]], [])


@pytest.mark.parametrize(
    "content",
    [b"a\nb\n\nc", b"\xef\xbb\xbfa\nb\n\nc", b"a\r\nb\r\n\r\nc\r\n", b"\n\n a\t\nb \n \n\t\n\nc\n\n\n"],
    ids=["no end", "BOM", "CRLF", "spaces"],
)
def test_txt_layouts(tmp_path: Path, content: bytes) -> None:
    assert read(write(tmp_path / "a.txt", content)) == ([["a", "b"], ["c"]], [])


def test_txt_is_streamed(tmp_path: Path) -> None:
    # The first document comes before anything is read of what is broken behind it.
    file = write(tmp_path / "a.txt", b"a\n\n" + b"b" * 100_000 + b"\0")
    documents = read_documents(file, on_problem=refuse)
    assert next(documents) == ["a"]
    with pytest.raises(CorpusError, match=r"a\.txt:3: NUL"):
        next(documents)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_datasets(is_streamed: bool) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": ["\n".join(lines) for lines in DOCUMENTS]})
    if is_streamed:
        dataset = dataset.to_iterable_dataset()
    assert list(documents_of(dataset, on_problem=refuse)) == DOCUMENTS


def test_rows() -> None:
    problems: list[Problem] = []
    rows: list[Any] = [{"text": "a"}, {"text": 3}, {"body": "b"}, "c", {"text": ["d", None]}, {"text": ("e", "f")}]
    assert list(documents_of(rows, on_problem=problems.append)) == [["a"], ["e", "f"]]
    assert [problem.line for problem in problems] == [2, 3, 4, 5]
    assert str(problems[1]) == "dataset:3: no field 'text'; there are 'body'; it is skipped"
    with pytest.raises(CorpusError, match="dataset: holds no text"):
        list(documents_of([], on_problem=refuse))


# ---- what is skipped -------------------------------------------------------------------------------------------------

GOOD = b'{"text": "a"}\n'

BAD: dict[str, tuple[str, bytes, list[list[str]], int | None, str]] = {
    "not UTF-8": ("x.txt", b"a\nb\xff\nc\n\nd", [["a", "c"], ["d"]], 2, "not UTF-8 at byte 1 of the line"),
    "Latin-1": ("x.jsonl", GOOD + '{"text": "\xe9"}\n'.encode("latin-1") + GOOD, [["a"], ["a"]], 2, "not UTF-8"),
    "binary": ("x.txt", b"a\n\nb\nc\0\nd\n\ne", [["a"], ["b"]], 4, "NUL character"),
    "UTF-16": ("x.jsonl", GOOD + '{"text": "b"}\n'.encode("utf-16-le"), [["a"]], 2, "NUL character"),
    "escaped NUL": ("x.jsonl", b'{"text": "b\\u0000"}\n' + GOOD, [["a"]], 1, "NUL character"),
    "half a pair": ("x.jsonl", b'{"text": "b\\ud800"}\n' + GOOD, [["a"]], 1, "surrogates not allowed"),
    "broken JSON": ("x.jsonl", GOOD + b'{"text": "b"\n' + GOOD, [["a"], ["a"]], 2, "no JSON"),
    "deep JSON": ("x.jsonl", b"[" * 200_000 + b"\n" + GOOD, [["a"]], 1, "no JSON"),
    "no object": ("x.jsonl", b'"b"\n' + GOOD, [["a"]], 1, "a row is a str; an object with the field 'text'"),
    "no field": ("x.jsonl", b'{"body": "b", "id": 1}\n' + GOOD, [["a"]], 1, "no field 'text'; there are 'body', 'id'"),
    "number": ("x.jsonl", GOOD + b'{"text": 3}\n', [["a"]], 2, "field 'text' is a int"),
    "null": ("x.jsonl", GOOD + b'{"text": null}\n', [["a"]], 2, "field 'text' is a NoneType"),
    "mixed list": ("x.jsonl", GOOD + b'{"text": ["b", 1]}\n', [["a"]], 2, "field 'text' is a list"),
    "long line": ("x.txt", b"a\n" + b"b" * 45 + b"\nc\n", [["a", "c"]], 2, "line longer than 20 bytes"),
    "long binary": ("x.txt", b"a\n" + b"b" * 45 + b"\0\nc\n", [["a"]], 2, "NUL character"),
    "no blanks": ("x.txt", b"0123456789\nabcdefghij\nklm\n", [["0123456789", "abcdefghij"], ["klm"]], 2, "blank line"),
    "no gzip": ("x.txt.gz", b"a\n", [], 1, "damaged or cut"),
    "no xz": ("x.jsonl.xz", GOOD, [], 1, "damaged or cut"),
    "no Parquet": ("x.parquet", GOOD, [], 1, "damaged, cut or no Parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, documents, line, reason = BAD[case]
    if case.startswith(("long", "no blanks")):
        for module in (lines, readers):
            monkeypatch.setattr(module, "MAX_LINE", 20)
    file = write(tmp_path / name, content)
    found, problems = read(file)
    assert found == documents
    assert [(problem.file, problem.line) for problem in problems] == [(file, line)] + [(file, None)] * (not documents)
    assert reason in problems[0].reason
    with pytest.raises(CorpusError) as caught:
        list(read_documents(file, on_problem=refuse))
    assert str(caught.value).startswith(f"{file}:{line}: ")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_cut_files(tmp_path: Path, suffix: str) -> None:
    whole_lines = [f"line {number} {number**5}" for number in range(50_000)]
    whole = PACKINGS[suffix](txt([[line] for line in whole_lines]))
    documents, problems = read(write(tmp_path / f"a.txt{suffix}", whole[: len(whole) * 2 // 3]))
    assert 0 < len(documents) < len(whole_lines)
    assert documents == [[line] for line in whole_lines[: len(documents)]]
    (problem,) = problems
    assert problem.line is not None
    assert abs(problem.line - 2 * len(documents)) <= 1
    assert "damaged or cut" in problem.reason


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"], ids=["empty", "blank", "BOM"])
def test_empty_files(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path / "a.txt", content)
    assert read(file) == ([], [Problem(file, None, "holds no text")])
    assert str(read(file)[1][0]) == f"{file}: holds no text"


def test_bad_parquet(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", ["a", None, "c\0", "d\r\ne"])
    documents, problems = read(file)
    assert documents == [["a"], ["d", "e"]]
    assert [problem.line for problem in problems] == [2, 3]
    assert "no column 'body'; there are 'other', 'text'" in read(file, "body")[1][0].reason
    assert "column 'other' is of type int64" in read(file, "other")[1][0].reason
    content = file.read_bytes()
    start = content.index(b"a", 4)  # the first page: its header is destroyed, the file's own is not
    documents, problems = read(write(tmp_path / "b.parquet", content[:4] + b"\xff" * (start - 4) + content[start:]))
    assert problems
    assert "damaged, cut or no Parquet" in problems[0].reason


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_find_files(tmp_path: Path) -> None:
    names = [
        "b.txt",
        "a.JSONL.gz",
        "sub/c.parquet",
        "sub/d.v2.txt.xz",
        "a.md",
        "p.parquet.gz",
        "x.gz",
        ".h.txt",
        ".g/i.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ("a.JSONL.gz", "b.txt", "sub/c.parquet", "sub/d.v2.txt.xz")]
    assert find_files([tmp_path]) == expected
    assert find_files([str(tmp_path / "b.txt"), tmp_path]) == [expected[1], expected[0], *expected[2:]]
    for path, reason in [("a.md", "no known suffix; it must be .txt"), ("p.parquet.gz", "suffix"), ("no", "not exist")]:
        with pytest.raises(CorpusError, match=reason):
            find_files([tmp_path / path])
    (tmp_path / "none").mkdir()
    for paths in ([tmp_path / "none"], []):
        with pytest.raises(CorpusError, match="no files found"):
            find_files(paths)


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"a\.csv has no known suffix"):
        read(write(tmp_path / "a.csv", b"a"))


# ---- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentences",
    [
        ["One. two."],
        ["One.", "Two!", "Three?", "Four"],
        ["He said “No.”", "Then (she left.)", "“Why?”", "He asked."],
        ["Dr. Who met Mr. T. S. Eliot vs. Prof. Al in St. Ives.", "They ate, e.g. Bread, i.e. Food."],
        ["Pi is 3.14 or so.", "No. 5 is alive.", "I said no.", "Next."],
        ["Tea, milk, etc. were there.", "Cups, etc.", "Were not."],
        ["1. First point.", "2. Second point."],
        ["In the U.S. Army.", "Wait... what?", "Well...", "Fine."],
        ["Es war 1999.", "Über allem.", "¿Qué?", "¡Sí!"],
        ["Um. - Er."],
    ],
    ids=lambda sentences: sentences[0],
)
def test_sentences(sentences: list[str]) -> None:
    assert split_sentences("  " + " \t".join(sentences)) == sentences


@settings(deadline=None)
@given(st.one_of(st.text(), st.text("aB1.!?\"')(“… \u2028\n")))
def test_no_text_is_lost(text: str) -> None:
    sentences = split_sentences(text)
    assert " ".join(sentences) == " ".join(text.split())
    assert all(sentence.strip() for sentence in sentences)

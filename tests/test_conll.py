"""Sentences in words, from columns, .jsonl and texts: what is read, what is passed over, what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bert_fast.tasks import DataError
from bert_fast.tasks.data.conll import read_columns
from bert_fast.tasks.data.sentences import Sentence, read_json_lines, read_texts

PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}

ANNA = (("Anna", "B-PER"), ("sleeps", "O"))
HASH = (("#Oslo", "B-LOC"), ("now", "O"))


def write(file: Path, content: str) -> Path:
    file.write_bytes(content.encode())
    return file


def columns(file: Path, token: int = 1, label: int | None = -1) -> list[Sentence]:
    return list(read_columns(file, token, label))


def pairs(sentence: Sentence) -> tuple[tuple[str, str], ...]:
    assert sentence.labels is not None
    return tuple(zip(sentence.tokens, sentence.labels, strict=True))


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_columns(tmp_path: Path, packing: str, end: str) -> None:
    file = tmp_path / f"a.conll{packing}"
    file.write_bytes(PACKINGS[packing](end.join(["Anna\tB-PER", "sleeps\tO", "", "#Oslo\tB-LOC", "now\tO"]).encode()))
    found = columns(file)
    assert [pairs(sentence) for sentence in found] == [ANNA, HASH]
    assert [sentence.place for sentence in found] == [f"{file}:1", f"{file}:4"]
    assert [sentence.lines for sentence in found] == [(1, 2), (4, 5)]
    assert found[0].key == "Anna sleeps"


@pytest.mark.parametrize(
    ("token", "label", "expected"),
    [(1, -1, ANNA), (1, 4, ANNA), (1, 3, (("Anna", "B-NP"), ("sleeps", "B-VP"))), (2, -3, None), (4, 1, None)],
)
def test_chosen_columns(tmp_path: Path, token: int, label: int, expected: Any) -> None:
    file = write(tmp_path / "train", "Anna NNP B-NP B-PER\nsleeps VBZ  B-VP O \n")
    if token == -label - 1:
        with pytest.raises(DataError, match=r"train:1: columns: 4; token_column 2 and label_column -3 are the same"):
            columns(file, token, label)
    elif expected is not None:
        assert [pairs(sentence) for sentence in columns(file, token, label)] == [expected]
    else:
        assert pairs(columns(file, token, label)[0]) == (("B-PER", "Anna"), ("O", "sleeps"))


@pytest.mark.parametrize(
    "content",
    [
        "-DOCSTART-\tO\nAnna\tB-PER\nsleeps\tO\n-DOCSTART-\tO\n\n#Oslo\tB-LOC\nnow\tO\n",
        "\n\nAnna\tB-PER\nsleeps\tO\n\t\n \n#Oslo\tB-LOC\nnow\tO\n\n\ufeff",
        "\ufeff# about\n# two\nAnna\tB-PER\nsleeps\tO\n\n#begin (x); part\t1 2\t3\n#Oslo\tB-LOC\nnow\tO\n\n#end\n",
    ],
    ids=["documents", "blank lines", "comments"],
)
def test_passed_over(tmp_path: Path, content: str) -> None:
    assert [pairs(sentence) for sentence in columns(write(tmp_path / "a.bio", content))] == [ANNA, HASH]


def test_white_space_that_is_no_blank_stays(tmp_path: Path) -> None:
    file = write(tmp_path / "a.conll", "New York\tB-LOC\na\u3000b\u00a0\tO\n\u2028\tO\n")
    assert columns(file)[0].tokens == ("New York", "a\u3000b\u00a0", "\u2028")


def test_conllu(tmp_path: Path) -> None:
    lines = ["# text = du vin", "1-2\tdu\t_", "1\tde\tADP", "2\tle\tDET", "2.1\tbon\tADJ", "3\tvin\tNOUN"]
    found = columns(write(tmp_path / "a.conllu", "\n".join(lines)), 2)
    assert [pairs(sentence) for sentence in found] == [(("de", "ADP"), ("le", "DET"), ("vin", "NOUN"))]
    assert found[0].lines == (3, 4, 6)


def test_columns_without_labels(tmp_path: Path) -> None:
    found = columns(write(tmp_path / "a.conll", "Anna\nsleeps\n\nnow"), label=None)
    assert [sentence.tokens for sentence in found] == [("Anna", "sleeps"), ("now",)]
    assert {sentence.labels for sentence in found} == {None}


@pytest.mark.parametrize(
    ("content", "token", "label", "reason"),
    [
        ("", 1, -1, ": no sentences"),
        ("\n# only\n-DOCSTART- O\n", 1, -1, ": no sentences"),
        ("Anna\nsleeps\n", 1, -1, ":1: columns: 1; token_column 1 and label_column -1 are the same"),
        ("\nAnna B-PER\n", 1, 4, ":2: columns: 2; label_column is 4"),
        ("Anna B-PER\n", 1, -3, ":1: columns: 2; label_column is -3"),
        ("Anna B-PER\n", 3, 1, ":1: columns: 2; token_column is 3"),
        ("a O\n\nb O\nc\n", 1, -1, ":4: columns: 1; line 1 has 2"),
        ("a O\n\nNew York O\n", 1, -1, ":3: columns: 3; line 1 has 2"),
        ("a O\n# b c\n", 1, -1, ":2: columns: 3; line 1 has 2"),
        ("a\tO\n\tO\n", 1, -1, ":2: the token is empty"),
        ("a\tO\nb\t \n", 1, -1, ":2: the label is empty"),
        ("a O\nb\0 O\n", 1, -1, ":2: NUL character"),
    ],
)
def test_bad_columns(tmp_path: Path, content: str, token: int, label: int, reason: str) -> None:
    file = write(tmp_path / "a.conll", content)
    with pytest.raises(DataError) as caught:
        columns(file, token, label)
    assert str(caught.value).startswith(f"{file}{reason}")


# ---- JSON lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"tokens": ["Anna", "sleeps"], "labels": ["B-PER", "O"]}, {}),
        ({"id": 7, "words": ["Anna", "sleeps"], "ner_tags": ["B-PER", "O"]}, {}),
        ({"tokens": ["Anna", "sleeps"], "tags": ["B-PER", "O"], "text": None}, {}),
        ({"tokens": ["Anna", "sleeps"], "tags": ["X", "Y"], "mine": ["B-PER", "O"]}, {"labels": "mine"}),
    ],
)
def test_json_lines(tmp_path: Path, row: dict[str, Any], names: dict[str, str]) -> None:
    file = write(tmp_path / "a.jsonl", f"\n{json.dumps(row)}\n")
    (found,) = read_json_lines(file, names, "blanks", is_labelled=True)
    assert pairs(found) == ANNA
    assert (found.place, found.lines, found.text) == (f"{file}:2", (), None)


def test_json_lines_without_labels(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"tokens": ["Anna"], "labels": "nothing"}, {"text": " Anna  (late)\nsleeps. "}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    first, second = read_json_lines(file, {}, "punctuation", is_labelled=False)
    assert (first.tokens, first.labels, first.spans) == (("Anna",), None, ())
    assert second.tokens == ("Anna", "(", "late", ")", "sleeps", ".")
    assert [rows[1]["text"][start:end] for start, end in second.spans] == list(second.tokens)


@pytest.mark.parametrize(
    ("row", "is_labelled", "reason"),
    [
        ({"tokens": ["a", "b"], "labels": ["O"]}, True, ":2: labels: 1, but tokens: 2"),
        ({"tokens": [], "labels": []}, True, ":2: tokens is empty"),
        ({"tokens": ["a", " "], "labels": ["O", "O"]}, True, ":2: tokens, 2: ' ' is empty"),
        ({"tokens": ["a"], "labels": [""]}, True, ":2: labels, 1: '' is empty"),
        ({"tokens": ["a"], "ner_tags": [3]}, True, ":2: labels, 1: 3 is a int; a string is needed"),
        ({"tokens": "a b", "labels": ["O"]}, True, ":2: tokens is a str; a list of strings is needed"),
        ({"text": "a b", "labels": ["O"]}, True, ":2: no column tokens or words"),
        ({"tokens": ["a"]}, True, ":2: no column labels or tags or ner_tags"),
        ({"id": 3}, False, ":2: neither tokens nor text"),
        ({"text": "\t"}, False, ":2: text is empty"),
        ({"text": ["a"]}, False, ":2: text is a list; a string is needed"),
    ],
)
def test_bad_json_lines(tmp_path: Path, row: dict[str, Any], is_labelled: bool, reason: str) -> None:
    file = write(tmp_path / "a.jsonl", '{"tokens": ["a"], "labels": ["O"]}\n' + json.dumps(row))
    with pytest.raises(DataError) as caught:
        list(read_json_lines(file, {}, "blanks", is_labelled=is_labelled))
    assert str(caught.value).startswith(f"{file}{reason}")


def test_empty_json_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: no rows"):
        list(read_json_lines(write(tmp_path / "a.jsonl", "\n"), {}, "blanks", is_labelled=True))


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_texts(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "  Anna\tsleeps,\u00a0now\n\nOslo\n")
    first, second = read_texts(file, "blanks")
    assert first.tokens == ("Anna", "sleeps,", "now")
    assert first.spans == ((2, 6), (7, 14), (15, 18))
    assert (first.text, first.place, second.place) == ("  Anna\tsleeps,\u00a0now", f"{file}:1", f"{file}:3")


@pytest.mark.parametrize(("content", "reason"), [("\n \n", ": no sentences"), ("a\n-DOCSTART- O\n", ":2: columns")])
def test_bad_texts(tmp_path: Path, content: str, reason: str) -> None:
    file = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError) as caught:
        list(read_texts(file, "blanks"))
    assert str(caught.value).startswith(f"{file}{reason}")


def test_refuse_names_the_word() -> None:
    sentence = Sentence("a.conll:3", ("x", "y"), ("O", "O"), (3, 5))
    with pytest.raises(DataError, match=r"^a\.conll:5: word 2, 'y': no$"):
        sentence.refuse(1, "no")
    with pytest.raises(DataError, match=r"^a\.jsonl:3: word 2, 'y': no$"):
        Sentence("a.jsonl:3", ("x", "y")).refuse(1, "no")

"""Questions as SQuAD and Hugging Face write them, and every fault with its place."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from bert_fast.tasks.data.problems import DataError
from bert_fast.tasks.data.squad import Question, Reading, Span, read_questions

CONTEXT = "The Nile flows north. Some say the Nile is long; the Amazon is longer."
NILE = {"text": "the Nile", "answer_start": 31}
AMAZON = {"text": "Amazon", "answer_start": 53}


def question(**changes: Any) -> dict[str, Any]:
    """A question, with changed fields; those that are changed to ... are taken out."""
    values = {"id": "q1", "question": " What is long? ", "answers": [NILE, AMAZON], **changes}
    return {name: value for name, value in values.items() if value is not ...}


def write(folder: Path, *questions: Any, title: Any = "Rivers", context: Any = CONTEXT, name: str = "a.json") -> Path:
    article: dict[str, Any] = {"title": title, "paragraphs": [{"context": context, "qas": list(questions)}]}
    first = {"title": "Lakes", "paragraphs": [{"context": "Deep.", "qas": []}] * 2}
    return write_text(folder, json.dumps({"version": "1.1", "data": [first, article]}), name)


def write_lines(folder: Path, *rows: Any) -> Path:
    return write_text(folder, "".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")


def write_text(folder: Path, text: str, name: str) -> Path:
    file = folder / name
    content = text.encode()
    if file.suffix in (".gz", ".xz"):
        content = (gzip if file.suffix == ".gz" else lzma).compress(content)
    file.write_bytes(content)
    return file


def read(file: Path, **reading: Any) -> list[Question]:
    return read_questions(file, Reading(**reading))


def refused(file: Path, **reading: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(file, **reading)
    return str(caught.value)


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.xz"])
def test_squad(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, question(), question(id="q2", answers=[AMAZON]), name=name)
    place = f"{file}: article 'Rivers', paragraph 1, question"
    spans = (Span("the Nile", 31), Span("Amazon", 53))
    assert read(file) == [
        Question(f"{place} 'q1'", "q1", "What is long?", CONTEXT, spans, "Rivers"),
        Question(f"{place} 'q2'", "q2", "What is long?", CONTEXT, spans[1:], "Rivers"),
    ]


def test_squad_2(tmp_path: Path) -> None:
    plausible = [{"text": "Nile", "answer_start": 4}]
    file = write(
        tmp_path,
        question(is_impossible=False),
        question(id="q2", is_impossible=True, answers=[], plausible_answers=plausible),
        question(id="q3", is_impossible=True, answers=...),
    )
    assert [len(example.answers or ()) for example in read(file)] == [2, 0, 0]
    assert [example.answers is None for example in read(file)] == [False] * 3


@pytest.mark.parametrize(
    "answers", [[NILE, AMAZON], {"text": ["the Nile", "Amazon"], "answer_start": [31, 53], "more": None}]
)
def test_lines(tmp_path: Path, answers: Any) -> None:
    row = question(context=CONTEXT, answers=answers, title="Rivers")
    file = write_lines(tmp_path, row, {**row, "id": 7, "title": None})
    spans = (Span("the Nile", 31), Span("Amazon", 53))
    assert read(file) == [
        Question(f"{file}:1", "q1", "What is long?", CONTEXT, spans, "Rivers"),
        Question(f"{file}:2", "7", "What is long?", CONTEXT, spans, None),
    ]


def test_fields_under_other_names(tmp_path: Path) -> None:
    file = write_lines(tmp_path, {"q": "Why?", "passage": CONTEXT})
    [found] = read(file, columns={"question": "q"}, is_labelled=False)
    assert (found.question, found.context, found.id) == ("Why?", CONTEXT, f"{file}:1")


def test_key_is_the_article_or_the_context(tmp_path: Path) -> None:
    assert [example.key for example in read(write(tmp_path, question()))] == ["Rivers"]
    assert [example.key for example in read(write(tmp_path, question(), title=None))] == [CONTEXT]


def test_context_stays_as_it_is(tmp_path: Path) -> None:
    context = "  \u00e9a\U0001f600 Nile \n"
    file = write(tmp_path, question(answers=[{"text": "Nile", "answer_start": 6}]), context=context)
    assert read(file)[0].context == context


def test_unlabelled(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        question(answers=...),
        question(id="q2", answers=[]),
        question(id="q3", is_impossible=True, answers=[]),
    )
    assert [example.answers for example in read(file, is_labelled=False)] == [None, None, ()]
    file = write_lines(tmp_path, {"question": "Why?", "context": CONTEXT}, question(context=CONTEXT))
    assert [example.answers is None for example in read(file, is_labelled=False)] == [True, False]


def test_empty_answers_of_hugging_face(tmp_path: Path) -> None:
    file = write_lines(tmp_path, question(context=CONTEXT, answers={"text": [], "answer_start": []}))
    assert "the setting empty_is_impossible" in refused(file)
    assert [example.answers for example in read(file, empty_is_impossible=True)] == [()]


def test_byte_order_mark(tmp_path: Path) -> None:
    text = write(tmp_path, question()).read_text(encoding="utf-8")
    assert len(read(write_text(tmp_path, "\ufeff" + text, "b.json"))) == 1


# ---- answers that stand elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "start", "nearest"),
    [
        ("Nile", 5, 4),
        ("Nile", 19, 4),
        ("Nile", 20, 35),
        ("Nile", -3, 4),
        ("Nile", 5000, 35),
        ("long", 43, 43),
        ("long", 44, 43),
        ("longer", 43, 63),
        (CONTEXT, 1, 0),
    ],
)
def test_nearest(tmp_path: Path, text: str, start: int, nearest: int) -> None:
    file = write(tmp_path, question(answers=[{"text": text, "answer_start": start}]))
    assert [example.answers for example in read(file, fix_starts=True)] == [(Span(text, nearest),)]
    if start != nearest:
        message = refused(file)
        assert f"does not stand at answer_start {start}, " in message
        assert f"the nearest stands at {nearest}, " in message


@pytest.mark.parametrize("fix_starts", [False, True])
def test_answer_that_stands_nowhere(tmp_path: Path, fix_starts: bool) -> None:
    file = write(tmp_path, question(answers=[NILE, {"text": "Danube", "answer_start": 3}]))
    assert refused(file, fix_starts=fix_starts).endswith(
        "question 'q1': answer 'Danube' does not stand at answer_start 3, and nowhere in the context"
    )


def test_what_stands_there(tmp_path: Path) -> None:
    shifted = question(answers=[{"text": "Nile", "answer_start": 5}])
    assert ", where there is 'ile '; the nearest" in refused(write(tmp_path, shifted))
    beyond = question(answers=[{"text": "Nile", "answer_start": 70}])
    assert ", where there is nothing of 70 characters; the nearest" in refused(write(tmp_path, beyond))


# ---- faults ----------------------------------------------------------------------------------------------------------

BAD_QUESTIONS = {
    "no id": (question(id=None), "no id"),
    "id of another type": (question(id=[1]), "id is [1]; a string is needed"),
    "no question": (question(question=...), "no question"),
    "empty question": (question(question=" \u200b\n"), "question is empty"),
    "question of another type": (question(question=3), "question is 3; a string is needed"),
    "half a surrogate pair": (question(question="a\ud800"), "question has half a surrogate pair at character 1"),
    "no answers": (question(answers=...), "no answers; is_impossible: true says that there is none"),
    "answers are null": (question(answers=None), "no answers; is_impossible: true says that there is none"),
    "no answers in version 2": (question(answers=[], is_impossible=False), "no answers; is_impossible: true says"),
    "answers of another type": (question(answers="Nile"), "answers is 'Nile'; a list is needed"),
    "answer of another type": (question(answers=["Nile"]), "answers has 'Nile' as number 1; an object is needed"),
    "no text": (question(answers=[{"answer_start": 4}]), "no text"),
    "empty text": (question(answers=[{"text": " ", "answer_start": 3}]), "text is empty"),
    "no answer_start": (question(answers=[{"text": "Nile"}]), "no answer_start"),
    "answer_start of another type": (
        question(answers=[{"text": "Nile", "answer_start": "4"}]),
        "answer_start is '4'; a whole number is needed",
    ),
    "answer_start is a truth": (
        question(answers=[{"text": "h", "answer_start": True}]),
        "answer_start is True; a whole number is needed",
    ),
    "unequal lists": (
        question(answers={"text": ["Nile"], "answer_start": []}),
        "answers have 1 values of text, but 0 of answer_start",
    ),
    "texts of another type": (
        question(answers={"text": "Nile", "answer_start": [4]}),
        "text is 'Nile'; a list is needed",
    ),
    "one list": (question(answers={"text": ["Nile"]}), "no answer_start"),
    "impossible and answered": (
        question(is_impossible=True),
        "is_impossible is true, but there is the answer 'the Nile'",
    ),
    "is_impossible of another type": (question(is_impossible="no"), "is_impossible is 'no'; true or false is needed"),
}


@pytest.mark.parametrize(("values", "reason"), BAD_QUESTIONS.values(), ids=BAD_QUESTIONS)
def test_bad_question(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    good = question(id="good", answers=[AMAZON])
    file = write(tmp_path, good, values)
    name = repr(values["id"])
    assert refused(file).startswith(f"{file}: article 'Rivers', paragraph 1, question {name}: ")
    assert reason in refused(file)
    if values["id"] is None or "question" not in values:
        return  # a line needs no id, and of the other its table says that it is missing
    file = write_lines(tmp_path, {**good, "context": CONTEXT}, {**values, "context": CONTEXT})
    assert refused(file).startswith(f"{file}:2: ")
    assert reason in refused(file)


@pytest.mark.parametrize(
    ("context", "reason"),
    [(None, "no context"), ("", "context is empty"), (["a"], "context is ['a']; a string is needed")],
)
def test_bad_context(tmp_path: Path, context: Any, reason: str) -> None:
    for file in (write(tmp_path, question(), context=context), write_lines(tmp_path, question(context=context))):
        assert refused(file).endswith(f": {reason}")


def test_bad_title(tmp_path: Path) -> None:
    assert refused(write(tmp_path, question(), title=5)).endswith("title is 5; a string is needed")


def test_two_questions_with_one_id(tmp_path: Path) -> None:
    file = write_lines(tmp_path, *(question(id=name, context=CONTEXT) for name in ("1", "2", 1)))
    assert refused(file) == f"{file}:3: id '1' is that of another question, too: {file}:1"


BAD_FILES = {
    "list": ("[]", ": []; an object with data is needed (.jsonl has an object a line)"),
    "no data": ("{}", ": no data"),
    "data of another type": ('{"data": {}}', ": data is {}; a list is needed"),
    "article of another type": ('{"data": [1]}', ": data has 1 as number 1; an object is needed"),
    "no paragraphs": ('{"data": [{}]}', ": article 1: no paragraphs"),
    "no questions of a paragraph": (
        '{"data": [{"title": "x", "paragraphs": [{"context": "c"}]}]}',
        ": article 'x', paragraph 1: no qas",
    ),
    "question of another type": (
        '{"data": [{"paragraphs": [{"context": "c", "qas": [[]]}]}]}',
        ": article 1, paragraph 1: qas has [] as number 1; an object is needed",
    ),
    "no questions": ('{"data": []}', ": no questions"),
    "cut": ('{"data":\n [{"tit', ":2: no JSON (Unterminated string starting at at column 4)"),
    "lines": ('{"data": []}\n{"data": []}', ":2: no JSON (Extra data at column 1)"),
    "deep": ("[" * 200_000, ": no JSON ("),
}


@pytest.mark.parametrize(("text", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path: Path, text: str, reason: str) -> None:
    file = write_text(tmp_path, text, "a.json")
    assert refused(file).startswith(f"{file}{reason}")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"\xff{}", "not UTF-8 at byte 0"),
        ("a.json.gz", gzip.compress(b"{}", mtime=0)[:-9], "damaged or cut"),
        ("a.json.xz", lzma.compress(b"{}")[:-9], "damaged or cut"),
        ("a.tsv", b"question\tcontext\n", "no known suffix; it must be .json or .jsonl"),
    ],
)
def test_bad_bytes(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert refused(file).startswith(f"{file}: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n", ": no rows"),
        ("[]\n", ":1: a list; an object"),
        ("{\n", ":1: no J"),
        ('{"context": "c"}\n', ":1: no column question or query; "),
    ],
)
def test_bad_lines(tmp_path: Path, text: str, reason: str) -> None:
    file = write_text(tmp_path, text, "a.jsonl")
    assert refused(file).startswith(f"{file}{reason}")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a.json")

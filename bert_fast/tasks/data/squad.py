"""Questions about texts: SQuAD's JSON, versions 1.1 and 2.0, and .jsonl, also with .gz or .xz."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ...lines import DAMAGED, bare_suffix, open_bytes
from .problems import DataError, bad_line
from .tables import Role, read_table

__all__ = ["Question", "Reading", "Span", "read_questions"]

ROLES = (
    Role("question", ("query",)),
    Role("context", ("passage",)),
    *(Role(name, (), is_required=False) for name in ("id", "title")),
)
ANSWERS = ("answers", "is_impossible")

KINDS = {str: "a string", int: "a whole number", bool: "true or false", list: "a list"}

SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True)
class Span:
    """
    Attributes:
        text: as it stands in the context.
        start: its first character.
    """

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        place: where it stands.
        id: names it; the place, where the file does not.
        question: stripped.
        context: as in the file, since answers are counted in its characters.
        answers: any of which is right; () where there is none in the context; None: not known.
        title: of the article.
    """

    place: str
    id: str
    question: str
    context: str
    answers: tuple[Span, ...] | None
    title: str | None = None

    @property
    def key(self) -> str:
        """The article; without a title, the context."""
        return self.title or self.context


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How questions are read.

    Attributes:
        is_labelled: whether answers must be there.
        columns: of .jsonl, names of fields; see read_table. Roles are question, context, id, answers, is_impossible and
            title.
        fix_starts: whether an answer that does not stand at its answer_start is looked for, the nearest one taken.
        empty_is_impossible: whether an empty list of answers, without is_impossible, says that there is none, as in
            Hugging Face's squad_v2.
    """

    is_labelled: bool = True
    columns: Mapping[str, str] = field(default_factory=dict)
    fix_starts: bool = False
    empty_is_impossible: bool = False


@dataclass(frozen=True)
class Record:
    """A question as the file has it.

    Attributes:
        place: where it stands.
        values: by roles, unchecked.
    """

    place: str
    values: Mapping[str, Any]

    def refuse(self, reason: str) -> NoReturn:
        raise DataError(f"{self.place}: {reason}")

    def get(self, name: str, kind: type) -> Any:
        """A value of a kind; None where there is none."""
        value = self.values.get(name)
        if value is not None and type(value) is not kind:
            self.refuse(f"{name} is {_short(value)}; {KINDS[kind]} is needed")
        return value

    def need(self, name: str, kind: type) -> Any:
        """A value of a kind, which must be there."""
        if self.values.get(name) is None:
            self.refuse(f"no {name}")
        return self.get(name, kind)

    def text(self, name: str) -> str:
        """A text with something to be read, as it stands."""
        value: str = self.need(name, str)
        if not any(letter.isprintable() and letter != " " for letter in value):
            self.refuse(f"{name} is empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.refuse(f"{name} has half a surrogate pair at character {error.start}")
        return value

    def parts(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a list, which must be there, with their numbers from 1."""
        for number, part in enumerate(self.need(name, list), 1):
            if not isinstance(part, dict):
                self.refuse(f"{name} has {_short(part)} as number {number}; an object is needed")
            yield number, part


def read_questions(file: Path, reading: Reading) -> list[Question]:
    """The questions of a file, in its order.

    .json: {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers", "is_impossible"}]}]}]}.
    .jsonl: an object {"id", "question", "context", "answers", "is_impossible", "title"} a line; the question and the
    context must be there. Answers are [{"text", "answer_start"}] or {"text": [...], "answer_start": [...]}.

    Args:
        file: UTF-8.
        reading: how.

    Raises:
        DataError: an unknown suffix, no JSON, a missing field or one of another type, an empty text, an answer that
            does not stand where it should, no answers, two questions with one id, no questions.
        ValueError: reading.columns names another role, or has numbers.
        OSError: the file cannot be opened.
    """
    suffix = bare_suffix(file)
    if suffix not in (".json", ".jsonl"):
        raise bad_line(file, None, "no known suffix; it must be .json or .jsonl, also with .gz or .xz")
    records = _articles(file) if suffix == ".json" else _rows(file, reading)
    result: dict[str, Question] = {}
    for record in records:
        question = _question(record, reading)
        if question.id in result:
            record.refuse(f"id {question.id!r} is that of another question, too: {result[question.id].place}")
        result[question.id] = question
    if not result:
        raise bad_line(file, None, "no questions")
    return list(result.values())


# ---- files -----------------------------------------------------------------------------------------------------------


def _rows(file: Path, reading: Reading) -> Iterator[Record]:
    answers = [Role(name, (), False, reading.is_labelled) for name in ANSWERS]
    for row in read_table(file, (*ROLES, *answers), reading.columns):
        yield Record(row.place, {"id": row.place, **row.values})


def _articles(file: Path) -> Iterator[Record]:
    content = _json(file)
    if not isinstance(content, dict):
        raise bad_line(file, None, f"{_short(content)}; an object with data is needed (.jsonl has an object a line)")
    for number, article in Record(str(file), content).parts("data"):
        title = article.get("title")
        name = repr(title) if isinstance(title, str) else str(number)
        yield from _paragraphs(Record(f"{file}: article {name}", article))


def _paragraphs(article: Record) -> Iterator[Record]:
    for number, content in article.parts("paragraphs"):
        paragraph = Record(f"{article.place}, paragraph {number}", content)
        shared = {"context": content.get("context"), "title": article.values.get("title")}
        for place, question in paragraph.parts("qas"):
            where = f"{paragraph.place}, question {question.get('id', place)!r}"
            yield Record(where, {"id": where, **question, **shared})


def _json(file: Path) -> Any:
    try:
        with open_bytes(file) as stream:
            return json.loads(stream.read().decode("utf-8-sig"))
    except DAMAGED as error:
        raise bad_line(file, None, f"damaged or cut ({error})") from None
    except UnicodeDecodeError as error:
        raise bad_line(file, None, f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise bad_line(file, error.lineno, f"no JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise bad_line(file, None, f"no JSON ({error})") from None


# ---- questions -------------------------------------------------------------------------------------------------------


def _question(record: Record, reading: Reading) -> Question:
    name = record.values["id"]
    context = record.text("context")
    return Question(
        place=record.place,
        id=str(name) if type(name) is int else record.text("id"),
        question=record.text("question").strip(),
        context=context,
        answers=_answers(record, context, reading),
        title=record.get("title", str),
    )


def _answers(record: Record, context: str, reading: Reading) -> tuple[Span, ...] | None:
    is_impossible = record.get("is_impossible", bool)
    given = _given(record)
    if is_impossible:
        if given:
            record.refuse(f"is_impossible is true, but there is the answer {_short(given[0].values.get('text'))}")
        return ()
    if given:
        return tuple(_span(answer, context, reading.fix_starts) for answer in given)
    if not reading.is_labelled:
        return None
    if given is not None and is_impossible is None and reading.empty_is_impossible:
        return ()
    way = "" if given is None else " (with the setting empty_is_impossible an empty list says the same)"
    return record.refuse(f"no answers; is_impossible: true says that there is none{way}")


def _given(record: Record) -> list[Record] | None:
    """The answers, unchecked; None: there is no list of them."""
    answers = record.values.get("answers")
    if answers is None:
        return None
    if isinstance(answers, dict):
        columns = Record(f"{record.place}: answers", answers)
        texts, starts = columns.need("text", list), columns.need("answer_start", list)
        if len(texts) != len(starts):
            record.refuse(f"answers have {len(texts)} values of text, but {len(starts)} of answer_start")
        return [
            Record(record.place, {"text": text, "answer_start": start})
            for text, start in zip(texts, starts, strict=True)
        ]
    return [Record(record.place, answer) for _, answer in record.parts("answers")]


def _span(answer: Record, context: str, fix_starts: bool) -> Span:
    text = answer.text("text")
    start: int = answer.need("answer_start", int)
    if start >= 0 and context.startswith(text, start):
        return Span(text, start)
    nearest = _nearest(text, context, start)
    said = f"answer {_short(text)} does not stand at answer_start {start}"
    if nearest is None:
        answer.refuse(f"{said}, and nowhere in the context")
    if not fix_starts:
        there = context[start : start + len(text)] if 0 <= start < len(context) else ""
        answer.refuse(
            f"{said}, where there is {_short(there) if there else f'nothing of {len(context)} characters'}; "
            f"the nearest stands at {nearest}, which the setting fix_starts takes"
        )
    return Span(text, nearest)


def _nearest(text: str, context: str, start: int) -> int | None:
    """Where the text begins that is nearest to `start`; None: nowhere."""
    start = min(max(start, 0), len(context))
    found = (context.rfind(text, 0, start + len(text)), context.find(text, start))
    return min((place for place in found if place >= 0), key=lambda place: abs(place - start), default=None)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]} ..."

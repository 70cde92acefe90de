"""Files of texts, read one after another: .txt, .jsonl, .tsv and .csv, also with .gz or .xz, and .parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from ...lines import Problem, bare_suffix, read_lines
from ..packages import package
from .problems import DataError, bad_line, refuse
from .tables import Role, read_table

__all__ = ["ALLOWED", "OnProblem", "Text", "find_texts", "read_texts"]

ALLOWED = ".txt, .jsonl, .tsv or .csv, also with .gz or .xz, or .parquet"

OnProblem: TypeAlias = Literal["refuse", "blank"]

ROLES = (
    Role("text", ("sentence", "passage", "contents")),
    Role("id", ("_id", "docid", "doc_id", "pid"), is_required=False),
)
TITLE = Role("title", (), is_required=False)  # read where it is asked for

ROWS = 1024  # of a Parquet file in memory at once


class Text(NamedTuple):
    """
    Attributes:
        file: it stands in.
        line: or row of a Parquet file, from 1.
        text: may be empty.
        id: None: the file has none.
        is_bad: whether "" stands for a line that could not be read.
    """

    file: Path
    line: int
    text: str
    id: str | None = None
    is_bad: bool = False


def find_texts(sources: Sequence[Path]) -> list[Path]:
    """The files, in the order of `sources`; a folder's files, and those of its folders, sorted by their paths.

    Hidden files and files with other suffixes are left out of folders.

    Raises:
        DataError: a path does not exist or has an unknown suffix, or a folder holds none of the files.
    """
    found: list[Path] = []
    for source in sources:
        if not source.exists():
            raise bad_line(source, None, f"does not exist; a file ({ALLOWED}) or a folder is needed")
        if source.is_dir():
            files = (file for file in sorted(source.rglob("*")) if _is_visible(file.relative_to(source)))
            inside = [file for file in files if _has_texts(file) and file.is_file()]
            if not inside:
                raise bad_line(source, None, f"holds no texts; they would be {ALLOWED}")
            found += inside
        elif _has_texts(source):
            found.append(source)
        else:
            raise bad_line(source, None, f"no known suffix; it must be {ALLOWED}")
    return found


def read_texts(
    files: Sequence[Path], columns: Mapping[str, str] | None = None, on_problem: OnProblem = "refuse"
) -> Iterator[Text]:
    """The texts of files, in order; nothing but a few of them is in memory.

    .txt: each line is a text, empty ones too. .jsonl: an object a line; of this, .tsv and .csv blank lines are passed
    over, see read_table. Texts are not stripped.

    Args:
        files: from find_texts; all with ids, or none.
        columns: names, or numbers, see read_table, for "text", "id" and "title"; a title is read only if it is named
            here, and stands before the text, as BEIR has it.
        on_problem: "refuse", or "blank": a line of .txt or .jsonl or a row of .parquet that cannot be read becomes an
            empty text. A fault of a .tsv or .csv is always refused, for the rows after it may be shifted.

    Raises:
        DataError: a line cannot be read, is no UTF-8 or JSON, has no text, or an id that is none; a file is damaged.
        ValueError: `columns` names something else.
        OSError: a file cannot be opened.
    """
    columns = dict(columns or {})
    for name in columns:
        if name not in ("text", "id", "title"):
            raise ValueError(f"column {name!r} is unknown; there are text, id and title")
    has_ids: bool | None = None
    for file in files:
        for text in READERS[bare_suffix(file)](file, columns, on_problem):
            if not text.is_bad:
                has_ids = text.id is not None if has_ids is None else has_ids
                if has_ids != (text.id is not None):
                    reason = "no id; the texts before it have one" if has_ids else "an id; those before it have none"
                    raise bad_line(file, text.line, reason)
            yield text


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _has_texts(file: Path) -> bool:
    kind = bare_suffix(file)
    return kind in READERS and (kind != ".parquet" or file.suffix.lower() == kind)


def _roles(columns: Mapping[str, str]) -> tuple[Role, ...]:
    return (*ROLES, TITLE) if "title" in columns else ROLES


# ---- readers ---------------------------------------------------------------------------------------------------------


def _read_txt(file: Path, _columns: Mapping[str, str], on_problem: OnProblem) -> Iterator[Text]:
    for number, line in _lines(file, on_problem):
        yield Text(file, number, line or "", None, line is None)


def _read_table(file: Path, columns: Mapping[str, str], _on_problem: OnProblem) -> Iterator[Text]:
    for row in read_table(file, _roles(columns), columns):
        yield _text(row.values, file, row.line, "refuse")


def _read_jsonl(file: Path, columns: Mapping[str, str], on_problem: OnProblem) -> Iterator[Text]:
    for number, line in _lines(file, on_problem):
        if line is None:
            yield Text(file, number, "", None, True)
        elif line.strip():
            yield _parsed(line, file, number, columns, on_problem)


def _parsed(line: str, file: Path, number: int, columns: Mapping[str, str], on_problem: OnProblem) -> Text:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _bad(file, number, f"no JSON ({error})", on_problem)
    if not isinstance(row, dict):
        return _bad(file, number, f"a {type(row).__name__}; an object is needed", on_problem)
    try:
        places = _places(list(row), columns)
    except ValueError as error:
        return _bad(file, number, str(error), on_problem)
    return _text({role: row[name] for role, name in places.items()}, file, number, on_problem)


def _read_parquet(file: Path, columns: Mapping[str, str], on_problem: OnProblem) -> Iterator[Text]:
    arrow, parquet = package("pyarrow", "reading .parquet"), package("pyarrow.parquet", "reading .parquet")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            try:
                places = _places(table.schema_arrow.names, columns)
            except ValueError as error:
                raise bad_line(file, None, str(error)) from None
            for batch in table.iter_batches(ROWS, columns=list(places.values())):
                values = {role: batch.column(name).to_pylist() for role, name in places.items()}
                for row in range(batch.num_rows):
                    number += 1
                    yield _text({role: value[row] for role, value in values.items()}, file, number, on_problem)
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        raise bad_line(file, number + 1, f"damaged, cut or no Parquet ({error})") from None


READERS: dict[str, Callable[[Path, Mapping[str, str], OnProblem], Iterator[Text]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".tsv": _read_table,
    ".csv": _read_table,
    ".parquet": _read_parquet,
}


# ---- lines and values ------------------------------------------------------------------------------------------------


def _lines(file: Path, on_problem: OnProblem) -> Iterator[tuple[int, str | None]]:
    """The lines without their ends; None for one that cannot be read, where that is allowed."""
    bad: list[int] = []

    def hear(problem: Problem) -> None:
        if on_problem == "refuse" or problem.line is None or problem.ends_file:
            refuse(problem)
        bad.append(problem.line)  # type: ignore[arg-type]

    for number, line in read_lines(file, hear):
        yield from ((earlier, None) for earlier in bad)
        bad.clear()
        yield number, line.rstrip("\r\n")
    yield from ((earlier, None) for earlier in bad)


def _places(names: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The names of the roles' fields.

    Raises:
        ValueError: one that is needed is missing.
    """
    places = {}
    for role in _roles(columns):
        asked = columns.get(role.name)
        if asked is not None and asked in names:
            places[role.name] = asked
        elif asked is None and (index := role.find(names)) is not None:
            places[role.name] = names[index]
        elif role.is_required or asked is not None:
            there = ", ".join(f"{name[:40]!r}" for name in names[:20]) or "none"
            raise ValueError(f"no field {asked or ' or '.join((role.name, *role.aliases))}; there are {there}")
    return places


def _text(values: Mapping[str, Any], file: Path, line: int, on_problem: OnProblem) -> Text:
    text, title, key = values["text"], values.get("title"), values.get("id")
    for name, value in (("text", text), ("title", title or "")):
        if not isinstance(value, str):
            return _bad(file, line, f"{name} is a {type(value).__name__}; a string is needed", on_problem)
        if not _is_unicode(value):
            return _bad(file, line, f"{name} holds half of a surrogate pair", on_problem)
    if "id" in values:
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            return _bad(file, line, f"id is {key!r}; a string or a whole number is needed", on_problem)
        key = str(key)
        if not key or "\n" in key or "\r" in key or not _is_unicode(key):
            return _bad(file, line, f"id is {key!r}; it must be a line of text", on_problem)
    return Text(file, line, f"{title} {text}" if title else text, key)


def _is_unicode(text: str) -> bool:
    """Whether it has no halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bad(file: Path, line: int, reason: str, on_problem: OnProblem) -> Text:
    if on_problem == "refuse":
        raise bad_line(file, line, reason)
    return Text(file, line, "", None, True)

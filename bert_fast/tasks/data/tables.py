"""Tables of examples: .tsv, .csv and .jsonl, also with .gz or .xz."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ...lines import MAX_LINE, bare_suffix
from .problems import DataError, bad_line, lines_of

__all__ = ["ALLOWED", "Role", "Row", "json_rows", "kind_of", "number_in", "read_table", "text_in"]

ALLOWED = ".tsv, .csv or .jsonl, also with .gz or .xz"

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half a pair, and halves that make a whole


@dataclass(frozen=True)
class Role:
    """What a column is for.

    Attributes:
        name: of the role, which is also a name that its column may have.
        aliases: other names that its column may have.
        is_required: whether a table without it is refused.
        is_needed_if_named: whether it is, too, where `columns` of read_table names it.
        has_one_name: whether a table with several of the aliases is refused, as its first may be the wrong one.
    """

    name: str
    aliases: tuple[str, ...] = ()
    is_required: bool = True
    is_needed_if_named: bool = True
    has_one_name: bool = False

    def find(self, header: Sequence[str]) -> int | None:
        """Which column it is, from 0; the name before the aliases, and these in their order."""
        lower = [name.strip().lower() for name in header]
        return next((lower.index(name) for name in (self.name, *self.aliases) if name in lower), None)

    def candidates(self, header: Sequence[str]) -> list[str]:
        """The columns that could be it, if none has its name."""
        lower = [name.strip().lower() for name in header]
        return [] if self.name in lower else [name for name in self.aliases if name in lower]


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        file: of the row.
        line: where it begins, from 1.
        values: by roles; strings but for .jsonl. Of roles that are not required some may be missing.
    """

    file: Path
    line: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def refuse(self, reason: str) -> NoReturn:
        """
        Raises:
            DataError: always.
        """
        raise bad_line(self.file, self.line, reason)


def read_table(file: Path, roles: Sequence[Role], columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a table, in order; blank lines are passed over.

    .tsv: fields between tabs, quotes are text. .csv: fields between commas, quoted where they hold commas or line ends.
    .jsonl: an object a line. The first line of .tsv and .csv names the columns, unless `columns` has numbers.

    Args:
        file: UTF-8.
        roles: that are read; other columns are not looked at.
        columns: of roles that stand under another name than their own and their aliases: the name in the file or, of a
            .tsv or .csv without a line of names, the number of the column from 1, of every role that is to be read.

    Raises:
        DataError: an unknown suffix, a required column that is missing, a row with more or fewer fields than the first,
            a line that is no JSON object, a file without rows.
        ValueError: `columns` names another role, or has numbers and names.
        OSError: the file cannot be opened.
    """
    wanted = {name: str(column) for name, column in (columns or {}).items()}
    known = [role.name for role in roles]
    for name in wanted:
        if name not in known:
            raise ValueError(f"column {name!r} is unknown; there are {', '.join(known)}")
    needed = [
        replace(role, is_required=True) if role.name in wanted and role.is_needed_if_named else role for role in roles
    ]
    readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}
    suffix = bare_suffix(file)
    if suffix not in readers:
        raise bad_line(file, None, f"no known suffix; it must be {ALLOWED}")
    is_empty = True
    for row in readers[suffix](file, needed, wanted):
        is_empty = False
        yield row
    if is_empty:
        raise bad_line(file, None, "no rows")


# ---- values ----------------------------------------------------------------------------------------------------------


def text_in(row: Row, role: str) -> str:
    """The text of a role, stripped.

    Raises:
        DataError: it is no string, or empty.
    """
    value = row.values[role]
    if not isinstance(value, str):
        row.refuse(f"{role} is {kind_of(value)}; a string is needed")
    if not value.strip():
        row.refuse(f"{role} is empty")
    return value.strip()


def kind_of(value: object) -> str:
    """What JSON calls it, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def number_in(row: Row, role: str) -> float:
    """The finite number of a role.

    Raises:
        DataError: it is none.
    """
    value = row.values[role]
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        row.refuse(f"{role} is {value!r}; a finite number is needed")
    return number


# ---- readers ---------------------------------------------------------------------------------------------------------


def _read_tsv(file: Path, roles: Sequence[Role], columns: Mapping[str, str]) -> Iterator[Row]:
    # A line of tabs is a row of empty fields.
    fields = ((number, line.split("\t")) for number, line in lines_of(file) if line.strip(" "))
    yield from _with_header(file, fields, roles, columns)


def _read_csv(file: Path, roles: Sequence[Role], columns: Mapping[str, str]) -> Iterator[Row]:
    yield from _with_header(file, _csv_fields(file), roles, columns)


def _csv_fields(file: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(MAX_LINE)  # of all readers of the process, whose usual limit is 128 KiB
    reader = csv.reader((f"{line}\n" for _, line in lines_of(file)), strict=True)
    line = 1
    try:
        for fields in reader:
            is_blank = not fields or (len(fields) == 1 and fields[0].isspace())
            if not is_blank:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise bad_line(file, line, f"no CSV ({error}); a quote within a quoted field is written twice") from None


def _with_header(
    file: Path, fields: Iterator[tuple[int, list[str]]], roles: Sequence[Role], columns: Mapping[str, str]
) -> Iterator[Row]:
    places: dict[str, int] | None = None
    width = 0
    for line, values in fields:
        if places is None:
            width = len(values)
            if _are_numbers(columns):
                places = _numbered(file, line, values, roles, columns)
            else:
                places = _named(file, line, values, roles, columns)
                continue
        if len(values) != width:
            raise bad_line(file, line, f"{_count(len(values), 'field')}; the first line has {width}")
        yield Row(file, line, {role: values[place] for role, place in places.items()})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _are_numbers(columns: Mapping[str, str]) -> bool:
    kinds = {value.isdecimal() for value in columns.values()}
    if len(kinds) == 2:
        raise ValueError(f"columns are {dict(columns)}; either all of them are numbers or all are names")
    return kinds == {True}


def _numbered(
    file: Path, line: int, first: Sequence[str], roles: Sequence[Role], columns: Mapping[str, str]
) -> dict[str, int]:
    for role in roles:
        if role.is_required and role.name not in columns:
            raise ValueError(f"columns have numbers, but none for {role.name}, which is needed")
    places = {name: int(number) - 1 for name, number in columns.items()}
    optional = {role.name for role in roles if not role.is_required}
    for name, place in list(places.items()):
        if 0 <= place < len(first):
            continue
        if name not in optional:
            raise bad_line(file, line, f"no column {place + 1}, which is to be {name}; there are {len(first)}")
        del places[name]
    if all(role.find([first[places[role.name]]]) is not None for role in roles if role.name in places):
        raise bad_line(
            file, line, f"these are the columns' names, {', '.join(first)[:80]}; name them, not their numbers"
        )
    return places


def _named(
    file: Path, line: int, header: Sequence[str], roles: Sequence[Role], columns: Mapping[str, str]
) -> dict[str, int]:
    found = {}
    for role in roles:
        asked = columns.get(role.name)
        if asked is None and role.has_one_name and len(several := role.candidates(header)) > 1:
            reason = f"columns {' and '.join(several)} could be {role.name}; --column {role.name}=NAME says which"
            raise bad_line(file, line, reason)
        place = role.find(header) if asked is None else _index(header, asked)
        if place is not None:
            found[role.name] = place
        elif role.is_required:
            raise _missing(file, line, header, role, asked)
    for role_name, place in found.items():
        if [name.strip() for name in header].count(header[place].strip()) > 1:
            raise bad_line(file, line, f"two columns are named {header[place].strip()!r}, which is to be {role_name}")
    return found


def _index(header: Sequence[str], name: str) -> int | None:
    return next((place for place, text in enumerate(header) if text.strip() == name), None)


def _missing(file: Path, line: int, header: Sequence[str], role: Role, asked: str | None) -> DataError:
    names = " or ".join((role.name, *role.aliases)) if asked is None else asked
    there = ", ".join(f"{name[:40]!r}" for name in header)
    return bad_line(
        file,
        line,
        f"no column {names}; there are {there}. --column {role.name}=NAME names it, =NUMBER without a header",
    )


def json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of .jsonl, with their lines from 1; blank lines are passed over.

    Raises:
        DataError: a line that is no JSON object.
        OSError: the file cannot be opened.
    """
    for line, text in lines_of(file):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise bad_line(file, line, f"no JSON ({error})") from None
        if not isinstance(row, dict):
            raise bad_line(file, line, f"{kind_of(row)}; an object is needed")
        if SURROGATE.search(text):
            _check_unicode(file, line, row)
        yield line, row


def _check_unicode(file: Path, line: int, row: dict[str, Any]) -> None:
    """Refuses halves of surrogate pairs, which JSON can say, but no tokenizer and no file takes."""
    for name, value in row.items():
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode("utf-8")
        except UnicodeEncodeError as error:
            where = f" at character {error.start}" if isinstance(value, str) else ""
            raise bad_line(file, line, f"{name} has half a surrogate pair{where}") from None


def _read_jsonl(file: Path, roles: Sequence[Role], columns: Mapping[str, str]) -> Iterator[Row]:
    if _are_numbers(columns):
        raise ValueError(f"columns are {dict(columns)}; {file} is .jsonl, whose fields have names")
    for line, row in json_rows(file):
        names = list(row)
        places = _named(file, line, names, roles, columns)
        values = {role: row[names[place]] for role, place in places.items()}
        required = {role.name for role in roles if role.is_required}
        yield Row(file, line, {role: value for role, value in values.items() if value is not None or role in required})

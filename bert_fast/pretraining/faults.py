"""What an error says of a faulty configuration: the key as in the TOML file, its value and what it takes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .keys import all_keys, allowed, section_of
from .settings import RunConfig


def explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """A line for each fault that pydantic found in a configuration's values."""
    lines = (line for fault in error.errors() for line in _lines(fault, values))
    return list(dict.fromkeys(lines))  # one value can have several, such as both numbers of a pair


def _lines(fault: Any, values: Any) -> list[str]:
    kind, place = fault["type"], fault["loc"]
    if kind == "value_error":  # from a section's own check, which names its keys
        return str(fault["ctx"]["error"]).split("\n")
    if kind in ("extra_forbidden", "invalid_key"):
        return [_unknown(place[:-1], str(place[-1]))]
    depth, field = _key_at(place)
    key, is_entry = _dotted(place[:depth]), isinstance(place[depth - 1], int)
    if kind == "missing" and depth == len(place):  # else a number of a pair is missing
        return [f"{key} is missing; it must be {allowed(field)}. {field.description}"]
    value = reduce(getitem, place[:depth], values)
    return [f"{key} is {_shown(value)}; it must be {'a table' if is_entry else allowed(field)}"]


def _key_at(place: Sequence[str | int]) -> tuple[int, FieldInfo]:
    """How many parts of a place name a key, and its field; what follows them is within the key's value."""
    depth, field = 1, RunConfig.model_fields[str(place[0])]
    while depth < len(place) and (section := section_of(field)):
        part = place[depth]
        if isinstance(part, str):  # else it is the number of an entry, which is of the array's section
            field = section.model_fields[part]
        depth += 1
    return depth, field


def _dotted(place: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _unknown(table: Sequence[str | int], name: str) -> str:
    keys = [key for key, _ in all_keys()]
    known = (
        [key.split(".")[1] for key in keys if key.startswith(f"{table[0]}.")] if table else [*RunConfig.model_fields]
    )
    near = [_dotted([*table, found]) for found in difflib.get_close_matches(name, known, n=1)]
    near = near or [key for key in keys if key.rpartition(".")[2] == name]
    key = _dotted([*table, name])
    if near:
        return f"{key} is unknown; did you mean {' or '.join(near)}?"
    return f"{key} is unknown; {f'[{_dotted(table)}]' if table else 'the file'} takes {', '.join(known)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."

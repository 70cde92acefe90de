"""The keys of a configuration by their dotted names: which there are, what each takes, and those of given values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from .settings import Allowed, RunConfig, Section


def all_keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every key, such as "out", "schedule.steps" or, of any entry of [[phases]], "phases.length"."""
    for name, field in RunConfig.model_fields.items():
        section = section_of(field)
        if section is None:
            yield name, field
        else:
            yield from ((f"{name}.{key}", entry) for key, entry in section.model_fields.items())


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field stands for, or each entry of its array; None where it stands for a value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words that follow "it must be"."""
    for entry in field.metadata:
        if isinstance(entry, Allowed):
            return entry.text
    if field.annotation is bool:
        return "true or false"
    if section_of(field) is not None:
        return "a table"
    return f"one of {', '.join(map(json.dumps, get_args(field.annotation)))}"


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys under a value, such as "schedule.steps" or "phases[0].length", each with its own value."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from flat(entry, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, entry in enumerate(value):
            yield from flat(entry, f"{key}[{number}]")
    else:
        yield key, value

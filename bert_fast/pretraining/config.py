"""The configuration of a pretraining run: read from TOML, checked as a whole, compared and described."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from sys import version_info
from typing import Any

from pydantic import ValidationError

from .faults import explain
from .keys import all_keys, allowed, flat
from .presets import PRESETS, completed, merge
from .settings import Phase, RunConfig

__all__ = ["PRESETS", "ConfigError", "Phase", "RunConfig", "describe", "differences", "dump", "from_dict", "load"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message has a line for each fault."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a TOML file.

    Args:
        path: of the file. Relative paths in it are taken from the working directory.
        overrides: "section.key=value", stronger than the file, the last one strongest. The value is TOML, or else text
            as it stands.

    Raises:
        ConfigError: no such file, wrong TOML (with the line), faults in it (all are listed), or an override without a
            key or a value.
    """
    values = _parse(Path(path))
    for override in overrides:
        values = merge(values, _override(override))
    return from_dict(values, source=str(path))


def from_dict(values: Mapping[str, Any], source: str = "the configuration") -> RunConfig:
    """The configuration of a TOML file's values, or of what dump gave.

    Args:
        values: table by table.
        source: what an error calls it.

    Raises:
        ConfigError: faults; all are listed.
    """
    whole = completed(values)
    try:
        return RunConfig.model_validate(whole)
    except ValidationError as error:
        faults = explain(error, whole)
    raise ConfigError(f"{source}: {faults[0]}" if len(faults) == 1 else "\n  ".join([f"{source}:", *faults]))


def dump(config: RunConfig) -> dict[str, Any]:
    """All values, ready for JSON; from_dict makes the same configuration of them."""
    return config.model_dump(mode="json")


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """The dotted keys whose values differ, such as "schedule.steps" or "phases[0].length", in the order of the keys."""
    one, other = (dict(flat(dump(config))) for config in (a, b))
    missing = object()
    return [key for key in {**one, **other} if one.get(key, missing) != other.get(key, missing)]


# ---- reading ---------------------------------------------------------------------------------------------------------


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} is no file; a TOML file is needed")
    try:
        return _toml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML or UTF-8
        raise ConfigError(f"{path}: {error}") from None


def _toml(text: str) -> dict[str, Any]:
    values: dict[str, Any] = import_module("tomllib" if version_info >= (3, 11) else "tomli").loads(text)
    return values


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"the override is {text!r}; it must be section.key=value")
    try:
        parsed = _toml(f"value = {value}")
    except ValueError:
        parsed = {}
    table: Any = parsed["value"] if parsed.keys() == {"value"} else value.strip()
    for name in reversed(names):
        table = {name: table}
    return dict(table)


# ---- describing ------------------------------------------------------------------------------------------------------

NEEDED = {"out": "runs/first", "data": {"corpus": "corpus"}, "schedule": {"steps": 100_000}}


def describe() -> str:
    """A TOML file with every key: what it is, what it takes, its default. Only the keys that a run needs are set."""
    defaults, needed = dict(flat(dump(from_dict(NEEDED)))), dict(flat(NEEDED))
    lines, table = [], ""
    for key, field in all_keys():
        section, _, name = key.rpartition(".")
        if section != table:
            table = section
            lines += ["", "# [[phases]]" if section == "phases" else f"[{section}]"]
        value = defaults[key.replace("phases.", "phases[0].")]
        lines += _comment(f"{field.description} It must be {allowed(field)}.")
        assignment = f"{name} = {'...' if value is None else json.dumps(value)}"
        lines += [assignment if key in needed else f"# {assignment}"]
        if key == "model.preset":
            lines += [line for name, values in PRESETS.items() for line in _comment(f"{name}: {_summary(values)}", 4)]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: int = 1) -> list[str]:
    margin = "#" + " " * indent
    return textwrap.wrap(text, 110, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def _summary(preset: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('model.')} = {json.dumps(value)}" for key, value in flat(preset))

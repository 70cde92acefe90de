"""The folder of a preparation: written by one process at a time, begun once, then continued with the same state."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .problems import CorpusError
from .shards import MANIFEST, STARTED, write_atomically

LOCK = ".lock"
WAYS_OUT = "go back to it, delete the folder or name another"


@contextmanager
def only_process(out: Path) -> Iterator[None]:
    """Within it no other process prepares the folder.

    Raises:
        RuntimeError: one does.
    """
    with (out / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError:
            raise RuntimeError(f"another process prepares {out}; one at a time can") from None
        yield


def begin(out: Path, state: Mapping[str, Any]) -> None:
    """Writes into an empty folder what it is of; where it is not empty, it must be of the same.

    Args:
        out: the folder.
        state: "format", "vocabulary", "sources" and "options" of the preparation, as JSON.

    Raises:
        CorpusError: the folder holds something else, or a preparation with another state.
    """
    file = out / STARTED
    if file.is_file():
        _check_state(out, json.loads(file.read_text(encoding="utf-8")), state)
        return
    others = [path for path in out.iterdir() if path.name != LOCK and not path.name.endswith(".tmp")]
    if others:
        raise CorpusError(f"{out} holds {others[0].name} and no preparation; a new or empty folder is needed")
    write_json(file, state)


def finished(out: Path, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished folder, where it is certain that it is of these sources.

    Rows without a fingerprint are known by their text alone, so they are read again.
    """
    if not (out / MANIFEST).is_file() or any(source.get("fingerprint", "") is None for source in state["sources"]):
        return None
    manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def finish(out: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, last of all, and removes what killed processes left of files that they were writing."""
    for folder in (out, out / "vocabulary"):
        for file in folder.glob(".*.tmp"):
            file.unlink(missing_ok=True)
    write_json(out / MANIFEST, manifest)


def write_json(file: Path, content: object) -> None:
    """Writes JSON; the file appears whole or not at all."""
    write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _check_state(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before["format"] == now["format"]:  # another one may have other options
        for name, value in now["options"].items():
            begun = before["options"].get(name)
            if begun != value:
                raise CorpusError(f"{out} was begun with {name}={begun!r}, and {name} is {value!r} now; {WAYS_OUT}")
    for name in ("format", "vocabulary", "sources"):
        if before[name] != now[name]:
            difference = _difference(before[name], now[name])
            raise CorpusError(f"{out} was begun with other {name} ({difference}); {WAYS_OUT}")


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, list):
        return f"{before} then, {now} now"
    changed = [source for source in before if source not in now] or [source for source in now if source not in before]
    if not changed:
        return "the same in another order"
    return f"{changed[0]['file'] or changed[0]['dataset']} is new, gone or changed"

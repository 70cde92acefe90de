"""A process for each contender: libraries in one process share thread pools, allocators and each other's settings."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from bert_fast.cli import models

from ..calls import Batch
from .peers import BY_NAME, Engine, Peer, Place

# Forked from a process that has started no thread, but imported what takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [__name__, "transformers.models.auto.tokenization_auto", "transformers.models.bert.modeling_bert"]
)

P = ParamSpec("P")
T = TypeVar("T")
Arrays = list[dict[str, np.ndarray]]


class LostError(RuntimeError):
    """A contender raised, or its process ended."""


class Contender:
    """An engine in a process of its own.

    Attributes:
        setting: which of several the engine chose.
        load_seconds: how long it took to load.
    """

    def __init__(self, place: Place, peer: Peer) -> None:
        """Raises LostError with the reason where it cannot be loaded."""
        self._connection, other = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(other, place, peer.name))
        start = time.perf_counter()
        self._process.start()
        other.close()
        try:
            self.setting: str | None = self._answer()
        except LostError:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start

    def do(self, function: Callable[Concatenate[Worker, P], T], *arguments: P.args, **named: P.kwargs) -> T:
        """What the function gives for the worker there; its name, arguments and result are pickled.

        Raises:
            LostError: the function raised, or the process ended.
        """
        with suppress(OSError):  # the answer says why
            self._connection.send((function, arguments, named))
        found: T = self._answer()
        return found

    def turn(self, repeats: int) -> float:
        """Seconds of one pass over what it prepared."""
        return self.do(Worker.turn, repeats)

    def _answer(self) -> Any:
        try:
            value, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise LostError(f"its process ended with status {self._process.exitcode}") from None
        if error is not None:
            raise LostError(error)
        return value

    def close(self) -> None:
        """Ends the process, which has nothing to keep."""
        self._connection.close()
        self._process.kill()
        self._process.join()


@dataclass
class Worker:
    """What a contender's process keeps.

    Attributes:
        call: the prepared call to time.
    """

    engine: Engine
    call: Callable[[], object] | None = None

    def states(self, batches: Arrays) -> list[np.ndarray]:
        """The hidden states of each batch."""
        return [hidden.numpy() for hidden in self.engine.states([_tensors(batch) for batch in batches])]

    def prepare(self, batches: Arrays) -> None:
        """Makes ready to time a pass over the batches, and takes one."""
        self.call = self.engine.work([_tensors(batch) for batch in batches])
        self.call()

    def turn(self, repeats: int) -> float:
        """Seconds of one pass."""
        if self.call is None:
            raise RuntimeError("nothing was prepared")
        return timed(self.call)(repeats)


def timed(call: Callable[[], object]) -> Callable[[int], float]:
    """A turn: mean seconds of so many calls."""

    def turn(repeats: int) -> float:
        if repeats > 1:  # until what the others put into the caches is gone, and sleeping cores are awake
            for _ in range(repeats):
                call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return turn


def _serve(connection: Connection, place: Place, name: str) -> None:
    """Loads the engine and does what is asked, until nobody asks."""
    torch.set_num_threads(place.threads)
    worker: Worker | None = None

    def load() -> str | None:
        nonlocal worker
        peer = BY_NAME[name]
        if peer.only is not None and peer.only != place.name:
            raise RuntimeError(f"measured with {peer.only} alone")
        with models.quiet():
            worker = Worker(peer.make(place))
        return worker.engine.setting

    def answer(function: Callable[[], Any]) -> None:
        try:
            with torch.inference_mode():
                reply: tuple[Any, str | None] = (function(), None)
        except Exception as error:
            reply = (None, reason(error))
        connection.send(reply)

    answer(load)
    while worker is not None:
        try:
            function, arguments, named = connection.recv()
        except EOFError:
            return
        answer(lambda: function(worker, *arguments, **named))  # noqa: B023


def reason(error: Exception) -> str:
    """One line for the report."""
    kind = "" if type(error) in (RuntimeError, LostError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).strip()[:300]}"


def arrays(batches: Sequence[Batch]) -> Arrays:
    """Batches as they travel; tensors would as shared memory."""
    return [{name: x.numpy() for name, x in batch.items()} for batch in batches]


def _tensors(batch: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(x) for name, x in batch.items()}


@dataclass
class Field:
    """A model's contenders.

    Attributes:
        missing: why one is not there.
    """

    place: Place
    missing: dict[str, str] = field(default_factory=dict)
    _present: dict[str, Contender] = field(default_factory=dict)

    def contender(self, name: str) -> Contender | None:
        """Loaded when it is first asked for; None where it is missing."""
        if name not in self._present and name not in self.missing:
            try:
                self._present[name] = Contender(self.place, BY_NAME[name])
            except LostError as error:  # a library may be missing, or a conversion have failed
                self.missing[name] = str(error)
        return self._present.get(name)

    def needed(self, name: str) -> Contender:
        """Raises LostError where it is missing."""
        if (found := self.contender(name)) is None:
            raise LostError(f"no {name}: {self.missing[name]}")
        return found

    def states(self, name: str, batches: Arrays) -> list[Tensor]:
        return [torch.from_numpy(hidden) for hidden in self.needed(name).do(Worker.states, batches)]

    def facts(self) -> dict[str, Any]:
        """What was made for each contender, how long that took, and why one is missing."""
        return {
            "conversions": self.place.conversions(),
            "load_seconds": {name: found.load_seconds for name, found in self._present.items()},
            "settings": {name: found.setting for name, found in self._present.items() if found.setting is not None},
            "missing": self.missing,
        }

    def close(self) -> None:
        for contender in self._present.values():
            contender.close()
        self._present.clear()

"""Verification and timing that the cases share."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .report import Floor, Peer, Record

T = TypeVar("T")
Calls = Sequence[Callable[[], Any]]

# Relative Frobenius error that an operator may have: its result is rounded once, its operands as well.
ERROR_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

MIN_ROUNDS = 7
MAX_ROUNDS = 200


class Skip(Exception):  # noqa: N818
    """A measurement does not apply here; the argument says why."""


@dataclass
class Contender:
    """One way to do a piece of work.

    Attributes:
        calls: the same work on different inputs, so that no round finds its inputs in the cache.
        result: what of the call's value is compared with the reference; None: nothing is compared.
        make: called once, just before the first call, for what costs time: compilation. It gives the calls.
    """

    name: str
    calls: Calls = ()
    result: Callable[[Any], Sequence[Tensor]] | None = None
    make: Callable[[], Calls] | None = None


@dataclass
class Bench:
    """Where and how a run measures.

    Attributes:
        device: of the tensors.
        dtype: of the activations.
        is_dry: tiny sizes, on a CPU in Triton's interpreter.
        deadline: of time.monotonic.
        seconds_per_measurement: how long the counted rounds of one measurement may take.
        max_rounds: 1 where everything shall only be compiled.
        ceilings: bytes and FLOPs a second.
    """

    device: torch.device
    dtype: torch.dtype
    is_dry: bool
    deadline: float
    seconds_per_measurement: float = 1.0
    max_rounds: int = MAX_ROUNDS
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, real: T, dry: T) -> T:
        """A size, or another for the dry run."""
        return dry if self.is_dry else real

    def has_time(self, needed: float = 0.0) -> bool:
        """Whether so many seconds are left."""
        return time.monotonic() + needed <= self.deadline

    def need_cuda(self) -> None:
        if not self.is_cuda:
            raise Skip("needs a CUDA device")

    # ---- inputs ----

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).mul_(scale).to(dtype or self.dtype)

    def input_sets(self, bytes_touched: float) -> int:
        """How many sets of inputs are needed for a round to find nothing of the last in the cache."""
        if not self.is_cuda:
            return 1
        cache: int = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(8, round(3 * cache / bytes_touched + 0.5)))

    def synchronise(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    # ---- verification ----

    def verify(
        self, record: Record, found: Sequence[Tensor], expected: Sequence[Tensor], bound: float | None = None
    ) -> None:
        """Puts the error of our result into the record, and what is granted."""
        record.error = relative_error(found, expected)
        record.error_bound = ERROR_BOUNDS[self.dtype] if bound is None else bound

    # ---- timing ----

    def time(
        self,
        record: Record,
        ours: Contender,
        peers: Sequence[Contender],
        *,
        expected: Sequence[Tensor] | None = None,
        hides_host: bool = True,
    ) -> None:
        """Times ours and its peers in turns, and writes the medians into the record.

        Args:
            record: receives the times.
            ours, peers: one that raises is left out, with the reason; ours passes its exception on.
            expected: the reference's result, with which the peers' are compared.
            hides_host: whether the device is kept busy until a call is enqueued, so that its own time alone counts.
                Otherwise a call counts from an idle device to its end, as a user sees it.
        """
        runners = {ours.name: self._start(ours, hides_host)}
        for contender in peers:
            peer = Peer(contender.name)
            record.peers.append(peer)
            if not self.has_time(2.0):
                peer.reason = "no time left"
                continue
            try:
                runners[contender.name] = self._start(contender, hides_host)
                if expected is not None and contender.result is not None:
                    peer.error = relative_error(contender.result(runners[contender.name].calls[0]()), expected)
                    if not peer.error <= ERROR_BOUNDS[self.dtype]:
                        record.notes.append(f"{peer.name}: another result than the reference's")
            except Skip as skip:
                peer.reason = str(skip)
            except Exception as error:  # a peer may be missing on this machine; the others still tell something
                peer.reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
                runners.pop(contender.name, None)
        seconds = self._take_turns(list(runners.values()))
        record.rounds = len(seconds[0])
        medians = {name: statistics.median(times) for name, times in zip(runners, seconds, strict=True)}
        record.seconds = medians[ours.name]
        record.host_seconds = runners[ours.name].host_seconds
        for peer in record.peers:
            if peer.name in medians:
                peer.seconds = medians[peer.name]
                peer.ratio = peer.seconds / record.seconds
        if record.floor is not None:
            record.floor.fraction = record.floor.seconds / record.seconds

    def _start(self, contender: Contender, hides_host: bool) -> _Runner:
        """Warms up: compilation, handles, and how long the host takes."""
        started = time.monotonic()
        calls = contender.calls if contender.make is None else contender.make()
        runner = _Runner(self, calls, hides_host)
        for call in calls:
            call()
        self.synchronise()
        runner.warm_up_seconds = time.monotonic() - started
        times = []
        for _ in range(1 if self.is_dry else 5):
            self.synchronise()
            start = time.perf_counter()
            calls[0]()
            times.append(time.perf_counter() - start)
        self.synchronise()
        runner.host_seconds = statistics.median(times)
        return runner

    def _take_turns(self, runners: list[_Runner]) -> list[list[float]]:
        turns: list[list[float]] = [[] for _ in runners]
        limit = 1 if self.is_dry else self.max_rounds
        minimum = min(limit, MIN_ROUNDS)
        start = time.monotonic()
        while len(turns[0]) < limit:
            if len(turns[0]) >= minimum and time.monotonic() - start > self.seconds_per_measurement:
                break
            if turns[0] and not self.has_time():  # fewer rounds than wanted are better than none
                break
            for runner, times in zip(runners, turns, strict=True):
                times.append(runner.run(len(times)))
        return turns

    # ---- floors ----

    def floor(self, *, moved: float, flops: float = 0.0) -> Floor | None:
        """The least time of work that must move so many bytes and do so many floating-point operations."""
        bandwidth, rate = self.ceilings.get("copy bytes/s"), self.ceilings.get("matmul FLOP/s")
        if bandwidth is None or rate is None:
            return None
        if moved / bandwidth >= flops / rate:
            return Floor("bytes", moved, moved / bandwidth)
        return Floor("FLOPs", flops, flops / rate)


@dataclass
class _Runner:
    bench: Bench
    calls: Calls
    hides_host: bool
    host_seconds: float = 0.0
    warm_up_seconds: float = 0.0

    def run(self, index: int) -> float:
        """Seconds of one call."""
        call = self.calls[index % len(self.calls)]
        if not (self.bench.is_cuda and self.hides_host):
            self.bench.synchronise()
            start = time.perf_counter()
            call()
            self.bench.synchronise()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits, about 2e9 cycles a second, while the host enqueues; then the events frame its work alone.
        torch.cuda._sleep(int(2e9 * min(1.5 * self.host_seconds + 3e-5, 0.02)))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative Frobenius error of a pair; NaN is infinite."""
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} results and {len(expected)} expected")
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"a result has shape {tuple(ours.shape)} and the reference {tuple(theirs.shape)}")
        truth = theirs.detach().double()
        difference = float((ours.detach().to(truth.device).double() - truth).norm())
        error = difference / max(float(truth.norm()), 1e-30)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def measure_ceilings(bench: Bench) -> None:
    """A large copy on the device, bytes read and written, and a large matrix product; on random data."""
    source = torch.randn(bench.size(1 << 29, 1 << 12), device=bench.device, dtype=bench.dtype)
    target = torch.empty_like(source)
    copy = Record("", "copy")
    bench.time(copy, Contender("copy", [lambda: target.copy_(source)]), [])
    assert copy.seconds is not None
    bench.ceilings["copy bytes/s"] = 2 * source.numel() * source.element_size() / copy.seconds
    side = bench.size(8192, 64)
    a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    product = Record("", "matmul")
    bench.time(product, Contender("matmul", [lambda: a @ b]), [])
    assert product.seconds is not None
    bench.ceilings["matmul FLOP/s"] = 2 * side**3 / product.seconds


@contextmanager
def peak_memory(bench: Bench) -> Iterator[list[int]]:
    """Gives a list that receives the bytes that were allocated within beyond those before; empty without CUDA."""
    found: list[int] = []
    if not bench.is_cuda:
        yield found
        return
    bench.synchronise()
    before = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    yield found
    bench.synchronise()
    found.append(torch.cuda.max_memory_allocated(bench.device) - before)


def compiled(bench: Bench, function: Callable[..., T], **options: Any) -> Callable[..., T]:
    """torch.compile, with what timing a backward pass again and again needs."""
    bench.need_cuda()
    settings: Any = importlib.import_module("torch._functorch.config")
    settings.donated_buffer = False
    return torch.compile(function, dynamic=False, **options)

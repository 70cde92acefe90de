"""Times the candidates of a launch table, each checked against what the table has now."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from bert_fast import functional, ops

from ..facts import write_json
from . import report as reports
from .cases_attention import DROPOUT, Packed, full, pack, uniform
from .measure import ERROR_BOUNDS, Bench, Contender, relative_error
from .report import Record
from .run import make_bench, place

TOKENS = 32768
SMALL_TOKENS = 512  # enough to compile a candidate

Numbers = tuple[int, ...]


@dataclass
class Config:
    """What a row of a launch table depends on.

    Attributes:
        kernel: as the option --tune has it.
        max_length: of the sequences, for attention.
        width: the head size, or the features of a row.
        has_dropout: of attention.
    """

    kernel: str
    width: int
    max_length: int = 0
    has_dropout: bool = False


@dataclass
class Trial:
    """
    Attributes:
        numbers: rows, columns, num_warps and num_stages; behind them the programs of a backward pass that has partial
            sums. Empty: what the table has now.
        error: relative Frobenius error against the table's result.
        reason: why it was not timed.
    """

    config: Config
    numbers: Numbers
    seconds: float | None = None
    error: float | None = None
    reason: str | None = None


@dataclass
class Tuning:
    device: str
    facts: dict[str, str | None]
    trials: list[Trial] = field(default_factory=list)
    not_run: list[Config] = field(default_factory=list)


# ---- what is tried ---------------------------------------------------------------------------------------------------


def configs(bench: Bench, kernel: str) -> list[Config]:
    if kernel.startswith("attention"):
        if bench.is_dry:
            return [Config(kernel, 16, 20, has_dropout) for has_dropout in (False, True)]
        # BERT's own first: the time may end.
        return [
            Config(kernel, width, length, has_dropout)
            for width, has_dropout, length in itertools.product((64, 32), (False, True), (512, 128, 64, 2048))
        ]
    widths = (768, 1024) if kernel.startswith("layer_norm") else (3072,)
    return [Config(kernel, width) for width in bench.size(widths, (48,))]


def candidates(bench: Bench, config: Config) -> list[Numbers]:
    """The table's own row is timed besides these."""
    if bench.is_dry:
        return [{"attention": (16, 32, 4, 1), "layer_norm": (1, 64, 2, 1), "gelu": (2, 64, 4, 1)}[_family(config)]]
    if config.kernel == "attention":
        tiles = [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)]
        return [(*tile, stages) for tile in tiles for stages in _stages(config, (1, 2, 3, 4))]
    if config.kernel == "attention-backward":
        tiles = [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8)]
        return [(*tile, stages) for tile in tiles for stages in _stages(config, (1, 2, 3))]
    if config.kernel.startswith("layer_norm"):
        block = 1 << (config.width - 1).bit_length()
        if config.kernel == "layer_norm":
            return [(1, block, warps, 1) for warps in (1, 2, 4, 8)]
        programs = (132, 264, 396, 528, 1056, 2112)
        return [(1, block, warps, stages, p) for warps in (1, 2, 4, 8) for stages in (1, 2) for p in programs]
    tiles = [
        (1, 1024, 4),
        (2, 1024, 4),
        (4, 512, 4),
        (4, 1024, 4),
        (4, 1024, 8),
        (8, 512, 4),
        (8, 1024, 8),
        (2, 512, 4),
    ]
    if config.kernel == "gelu":
        return [(*tile, 1) for tile in tiles]
    return [(*tile, stages, p) for tile in tiles for stages in (1, 2) for p in (128, 256, 512, 1024)]


def _stages(config: Config, stages: Sequence[int]) -> Sequence[int]:
    """One block is all that there is in short rows: nothing to pipeline."""
    return (1, 2) if config.max_length <= 64 else stages


def _family(config: Config) -> str:
    return config.kernel.partition("-")[0]


@contextmanager
def launched_with(config: Config, numbers: Numbers) -> Iterator[None]:
    """Within it the kernel runs with these sizes, whatever its table says."""
    if not numbers:
        yield
        return
    from bert_fast.kernels import attention, gelu, layer_norm
    from bert_fast.kernels._launch import Launch

    launch = Launch(*numbers[:4])
    modules = {"attention": attention, "layer_norm": layer_norm, "gelu": gelu}
    changes: dict[str, dict[str, Any]] = {
        "attention": {"forward_launch": lambda *_, **__: launch},
        "attention-backward": {"backward_launch": lambda *_, **__: launch},
        "layer_norm": {"launch": lambda *_: launch},
        "layer_norm-backward": {"launch": lambda *_: launch},
        "gelu": {"LAUNCH": launch},
        "gelu-backward": {"BACKWARD_LAUNCH": launch},
    }
    change = dict(changes[config.kernel])
    if len(numbers) > 4:
        change["BACKWARD_PROGRAMS"] = numbers[4]
    with mock.patch.multiple(modules[_family(config)], **change):
        yield


# ---- what is timed ---------------------------------------------------------------------------------------------------


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [x for x in found if isinstance(x, Tensor)]


def _attention(config: Config, p: Packed, seed: Tensor | None) -> Callable[[], list[Tensor]]:
    rate = DROPOUT if config.has_dropout else 0.0
    place_of = (p.batch.tiles, p.batch.max_seqlen, p.scale, seed, 0, rate)
    if config.kernel == "attention":
        return lambda: _tensors(ops.launch_attention(p.q, p.k, p.v, *place_of))
    out, lse = ops.launch_attention(p.q, p.k, p.v, *place_of)
    return lambda: _tensors(ops.launch_attention_backward(p.grad, p.q, p.k, p.v, out, lse, *place_of))


def _layer_norm(bench: Bench, config: Config, rows: int, seed: Tensor) -> Callable[[], list[Tensor]]:
    x, residual, grad = (bench.randn(rows, config.width) for _ in range(3))
    weight, bias, input_bias = (bench.randn(config.width) for _ in range(3))
    y, mean, rstd = ops.launch_layer_norm(x, residual, weight, bias, 1e-12, input_bias, seed, 0, DROPOUT)
    assert mean is not None
    assert rstd is not None
    if config.kernel == "layer_norm":
        del y
        return lambda: _tensors(ops.launch_layer_norm(x, residual, weight, bias, 1e-12, input_bias, seed, 0, DROPOUT))
    return lambda: _tensors(
        ops.launch_layer_norm_backward(grad, x, residual, weight, mean, rstd, input_bias, seed, 0, DROPOUT)
    )


def _gelu(bench: Bench, config: Config, rows: int) -> Callable[[], list[Tensor]]:
    x, grad = (bench.randn(rows, config.width) for _ in range(2))
    bias = bench.randn(config.width)
    if config.kernel == "gelu":
        return lambda: _tensors(ops.launch_gelu(x, bias, "none"))
    return lambda: _tensors(ops.launch_gelu_backward(grad, x, bias, "none"))


def work(bench: Bench, config: Config, tokens: int) -> list[Callable[[], list[Tensor]]]:
    """The kernel's call, on as many inputs as keep the cache cold."""
    seed = functional.draw_seed(bench.device)
    if _family(config) == "attention":
        length = config.max_length
        # Half the rows full, half of any length: a table must serve both.
        lengths = torch.cat([full(length, tokens // 2), uniform(1, length, tokens // 2)])
        if bench.is_dry:
            lengths = torch.tensor([length, 3])
        heads = bench.size(768 // config.width, 2)
        touched = 8.0 * tokens * heads * config.width
        made = [pack(bench, lengths, heads, config.width) for _ in range(bench.input_sets(touched))]
        return [_attention(config, p, seed if config.has_dropout else None) for p in made]
    rows = bench.size(tokens // 2, 6)
    sets = bench.input_sets(4.0 * rows * config.width)
    if _family(config) == "layer_norm":
        return [_layer_norm(bench, config, rows, seed) for _ in range(sets)]
    return [_gelu(bench, config, rows) for _ in range(sets)]


def _with(config: Config, numbers: Numbers, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    with launched_with(config, numbers):
        return call()


@torch.no_grad()
def try_all(bench: Bench, config: Config, reasons: dict[Numbers, str]) -> list[Trial]:
    """Checks every candidate without a reason against it, then times those that are right, in turns."""
    calls = work(bench, config, TOKENS)
    wanted = calls[0]()
    trials = [Trial(config, numbers, reason=reasons.get(numbers)) for numbers in ((), *candidates(bench, config))]
    contenders = []
    for trial in trials:
        if trial.reason is None and not bench.has_time():
            trial.reason = "no time left"
        if trial.reason is not None:
            continue
        try:
            trial.error = relative_error(_with(config, trial.numbers, calls[0]), wanted)
        except Exception as error:
            trial.reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
            continue
        if not trial.error <= ERROR_BOUNDS[bench.dtype]:
            trial.reason = "another result than the table's"
            continue
        contenders.append(Contender(str(trial.numbers), [partial(_with, config, trial.numbers, c) for c in calls]))
    record = Record(config.kernel, str(config))
    bench.time(record, contenders[0], contenders[1:])
    seconds = {contenders[0].name: record.seconds, **{peer.name: peer.seconds for peer in record.peers}}
    for trial in trials:
        trial.seconds = seconds.get(str(trial.numbers))
    return trials


# ---- compiling beside ------------------------------------------------------------------------------------------------


def _compile(job: tuple[Config, Numbers]) -> None:
    """Runs a candidate once, in a process of its own, on a small input: its binary is then in the disk cache."""
    config, numbers = job
    bench = make_bench(is_dry=False, deadline=float("inf"))
    with torch.no_grad():
        for call in work(bench, config, max(SMALL_TOKENS, 2 * config.max_length))[:1]:
            _with(config, numbers, call)
    bench.synchronise()


def _why_not(job: tuple[Config, Numbers]) -> str | None:
    try:
        _compile(job)
    except Exception as error:  # too much shared memory, or a tile that the compiler does not know
        return f"{type(error).__name__}: {str(error).strip()[:200]}"
    return None


def compile_all(bench: Bench, config: Config, seconds: float = 90.0) -> dict[Numbers, str]:
    """Compiles the candidates of a configuration on many cores, since a second each on one adds up.

    Returns:
        Why a candidate cannot be timed. One that ends its process is among them, and ends nothing else.
    """
    if bench.is_dry:
        return {}
    if not _pools:
        processes = max(2, min(12, (os.cpu_count() or 2) - 2))
        _pools.append(multiprocessing.get_context("spawn").Pool(processes))
    end = time.monotonic() + seconds
    pending = {numbers: _pools[0].apply_async(_why_not, ((config, numbers),)) for numbers in candidates(bench, config)}
    reasons = {}
    for numbers, result in pending.items():
        try:
            reason = result.get(max(0.1, end - time.monotonic()))
        except multiprocessing.TimeoutError:
            reason = "not compiled: too slow, or the compiler crashed"
        if reason is not None:
            reasons[numbers] = reason
    return reasons


_pools: list[Any] = []


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(folder: Path, kernels: Sequence[str], minutes: float, is_dry: bool, console: Console) -> bool:
    """Writes FOLDER/tune.json and prints the best candidate of each configuration; whether the table's own ran."""
    bench = make_bench(is_dry, time.monotonic() + 60 * minutes)
    bench.seconds_per_measurement = 2.0
    device = "dry run" if is_dry else torch.cuda.get_device_name(bench.device)
    tuning = Tuning(device, reports.facts())
    todo = [config for kernel in kernels for config in configs(bench, kernel)]
    is_whole = True
    try:
        for index, config in enumerate(todo):
            if not bench.has_time(0.0 if is_dry else 15.0):
                tuning.not_run = todo[index:]
                break
            try:
                reasons = compile_all(bench, config)
                with place(bench):
                    tuning.trials += try_all(bench, config, reasons)
            except Exception as error:
                is_whole = False
                tuning.trials.append(Trial(config, (), reason=f"{type(error).__name__}: {error}"))
            finally:
                write_json(folder / "tune.json", asdict(tuning))
    finally:
        for pool in _pools:
            pool.terminate()
        _pools.clear()
    for config in todo:
        console.print(_best(config, tuning.trials), markup=False, highlight=False)
    return is_whole


def _best(config: Config, trials: list[Trial]) -> str:
    timed = {trial.numbers: trial.seconds for trial in trials if trial.config == config and trial.seconds is not None}
    label = f"{config.kernel}, width {config.width}" + (f", length {config.max_length}" if config.max_length else "")
    label += ", dropout" if config.has_dropout else ""
    if () not in timed:
        return f"{label}: not timed"
    now = timed[()]
    best = sorted(timed.items(), key=lambda item: item[1])[:3]
    ranks = "; ".join(f"{numbers or 'table'} {seconds * 1e6:,.1f} us {now / seconds:.2f}x" for numbers, seconds in best)
    return f"{label}: table {now * 1e6:,.1f} us; best {ranks}"

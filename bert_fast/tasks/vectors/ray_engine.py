"""Blocks embedded by the processes of a Ray cluster, on one machine or several.

The texts of the blocks that are not done are written into the work folder, Ray Data hands their numbers to a pool of
actors, and an actor writes a block's vectors as the local engine does. So the folder says what is done whatever
happens to an actor, a machine or the cluster; what an actor that dies was at, Ray gives to another.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..packages import package
from ..settings import at_least
from . import blocks
from .blocks import Block
from .embedder import Embedder, Options, fingerprint
from .work import Work

__all__ = ["Cluster", "Worker", "run"]

PURPOSE = "engine 'ray'"

MOST_TASKS = 10_000  # of Ray, each of one block or several


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Which processes embed. On several machines the file that is written must lie on a file system that all of them
    see, and a model's folder, too.

    Attributes:
        workers: processes, each with a model; None: as many as there is room for.
        cpus: of each, which is also its number of threads.
        gpus: of each; None: 1 where the cluster has any.
        address: of a running cluster; None: RAY_ADDRESS, or a cluster of this machine that is started and ended.
        temp: folder of that cluster's own files, with a short name, for it holds sockets; None: one that is removed.

    Raises:
        ValueError: a value is not allowed.
    """

    workers: int | None = None
    cpus: float = 1
    gpus: float | None = None
    address: str | None = None
    temp: Path | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            at_least("workers", self.workers, 1)
        at_least("cpus", self.cpus, 0)
        if self.gpus is not None:
            at_least("gpus", self.gpus, 0)


class Worker:
    """An actor: loads the model once, and embeds blocks by their numbers.

    Args:
        model, options: see Embedder.
        work: on a file system that this machine sees.

    Raises:
        ValueError: this machine has another model.
    """

    def __init__(self, model: str, options: Options, work: Work) -> None:
        if fingerprint(model) != work.state()["model"]:
            raise ValueError(f"the model {model} of {os.uname().nodename} has other files than where embed was called")
        self.work = work
        self.embedder = Embedder(model, options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        number, texts = int(batch["number"][0]), int(batch["texts"][0])
        staged = self.work.staged(number)
        if staged.exists():  # else another, which died before it could say so, has done it
            block = blocks.block_of(blocks.read_table(staged), number)
            self.work.save(block, self.embedder(block.texts))
            staged.unlink(missing_ok=True)
        return {"texts": [texts]}


def run(model: str, options: Options, cluster: Cluster, missing: Iterator[Block], work: Work) -> Iterator[int]:
    """Embeds blocks in any order; yields how many texts each had.

    Args:
        model, options: see Embedder.
        cluster: that does it.
        missing: the blocks.
        work: where they are written.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the cluster has no room for a worker.
        ray.exceptions.RayError: a worker's error, or the cluster's.
    """
    data = package("ray.data", PURPOSE)
    first = next(missing, None)
    if first is None:
        return
    # What is wrong with the model or the options is said here, not by a worker that dies of it.
    Embedder(model, replace(options, device="cpu", precision="fp32"))
    tasks = list(_staged(chain([first], missing), work))
    model = str(Path(model).resolve()) if Path(model).is_dir() else model  # workers may stand elsewhere
    work = replace(work, folder=work.folder.resolve())
    with _connected(cluster), _quiet(data):
        workers, gpus = _room(cluster)
        dataset = data.from_items(tasks, override_num_blocks=min(len(tasks), MOST_TASKS))
        results = dataset.map_batches(
            Worker,
            fn_constructor_args=(model, options, work),
            batch_size=1,
            batch_format="numpy",
            compute=data.ActorPoolStrategy(size=workers),
            num_cpus=cluster.cpus,
            num_gpus=gpus,
        )
        for row in results.iter_rows():
            yield int(row["texts"])


def _staged(missing: Iterator[Block], work: Work) -> Iterator[dict[str, int]]:
    """Writes the blocks' texts for the actors."""
    for block in missing:
        blocks.write_table(work.staged(block.number), blocks.table_of(block))
        yield {"number": block.number, "texts": len(block.texts)}


def _room(cluster: Cluster) -> tuple[int, float]:
    """How many workers there are to be, and how many GPUs each gets."""
    there = package("ray", PURPOSE).cluster_resources()
    gpus = cluster.gpus if cluster.gpus is not None else min(1, there.get("GPU", 0))
    wanted = {"CPU": cluster.cpus, "GPU": gpus}
    room = min((there.get(name, 0) / number for name, number in wanted.items() if number), default=1)
    if room < 1:
        has = ", ".join(f"{there.get(name, 0):g} {name}" for name in wanted)
        raise ValueError(f"a worker is to have {cluster.cpus:g} CPU, {gpus:g} GPU; the cluster has {has}")
    return cluster.workers or int(room), gpus


@contextmanager
def _connected(cluster: Cluster) -> Iterator[None]:
    """Within it there is a cluster; the caller's own, if it has called ray.init."""
    ray = package("ray", PURPOSE)
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield
    elif address is not None:
        with ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING):
            yield
    else:
        cpus = None if cluster.workers is None else math.ceil(cluster.workers * cluster.cpus)
        with TemporaryDirectory(prefix="ray") as temp, _environment():
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _temp_dir=str(cluster.temp or temp),
            )
            try:
                yield
            finally:
                ray.shutdown()


@contextmanager
def _environment() -> Iterator[None]:
    """Has a cluster of this machine keep to its own folder: no reports, and no token in the home folder."""
    access = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # Ray sets the first itself
    before = {name: os.environ.get(name) for name in (*access, "RAY_USAGE_STATS_ENABLED")}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not any(before[name] for name in access):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _quiet(data: Any) -> Iterator[None]:
    """Ray Data's bars and notes stay off the screen; its log file and its errors stay."""
    context = data.DataContext.get_current()
    handlers = [each for each in logging.getLogger("ray.data").handlers if isinstance(each, logging.StreamHandler)]
    before = [handler.level for handler in handlers]
    has_bars, context.enable_progress_bars = context.enable_progress_bars, False
    for handler in handlers:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = has_bars
        for handler, level in zip(handlers, before, strict=True):
            handler.setLevel(level)

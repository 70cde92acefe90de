"""What a run asks of the machine: processes that can talk, a precision, a folder of its own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .config import ConfigError, RunConfig


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Nobody else trains into the folder meanwhile.

    Raises:
        ConfigError: somebody does.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("wb") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process; its readers do not have it
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"out is {out}, into which another process trains; one at a time can") from None
        yield


def join_restarted(backend: str) -> None:
    """Makes the process group of processes that torchrun has started again, where accelerate would make it otherwise.

    torchrun keeps its store over restarts (torch 2.13), and a process may find addresses of the dead in it; names that
    have the number of the restart in them are new.
    """
    environ = os.environ
    restart, world_size = environ.get("TORCHELASTIC_RESTART_COUNT", "0"), int(environ.get("WORLD_SIZE", "1"))
    is_kept = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restart == "0" or world_size == 1 or not is_kept or distributed.is_initialized():
        return
    stores: Any = distributed
    store = stores.TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False)
    distributed.init_process_group(
        backend,
        store=stores.PrefixStore(f"restart_{restart}", store),
        rank=int(environ["RANK"]),
        world_size=world_size,
    )


def make_accelerator(config: RunConfig) -> Any:
    """accelerate's Accelerator for a run.

    Raises:
        ConfigError: the machine cannot compute in that precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    has_gpu = torch.cuda.is_available()
    if config.train.precision == "fp16" and not has_gpu:
        raise ConfigError('train.precision is "fp16", which needs a GPU; "fp32" and "bf16" work everywhere')
    join_restarted("nccl" if has_gpu else "gloo")
    AcceleratorState._reset_state()  # of an earlier run in this process, which may have had another precision
    precision = "no" if config.train.precision == "fp32" else config.train.precision
    return Accelerator(mixed_precision=precision, cpu=not has_gpu)

"""Two processes train what one trains: DDP, FSDP, checkpoints from one to the other, and a process that dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretraining_loop import (
    config_of,
    corpus,  # noqa: F401
    figures,
    names,
    one_thread,  # noqa: F401
    simple,
)
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bert_fast.pretraining import loop
from bert_fast.pretraining.checkpoints import CheckpointError
from bert_fast.pretraining.config import ConfigError, RunConfig, dump
from bert_fast.pretraining.loop import Run

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")

SECONDS = 60

TWO = {"tokens_per_step": 4 * 211, "tokens_per_pack": 211}

# Of which the second half of a run may be made with another number of steps.
STEADY = {"kind": "constant", "warmup": 0.0}


# ---- what the processes run ------------------------------------------------------------------------------------------


def train(rank: int, config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Of one process: what its model is wrapped in, the packs that it read, and where it came to."""
    read = []
    original = Run._step

    def recorded(self: Run, packs: Any, progress: Any, share: float) -> None:
        read.append([(progress.phase, pack.number) for pack in packs])
        original(self, packs, progress, share)

    Run._step = recorded  # type: ignore[method-assign]
    try:
        run = Run(config)
        result = run.go(resume=resume)
    finally:
        Run._step = original  # type: ignore[method-assign]
    is_sharded = isinstance(run.objective, FSDPModule)
    wrapper = "fsdp" if is_sharded else "ddp" if isinstance(run.objective, DistributedDataParallel) else "none"
    local = (x.to_local() if isinstance(x, DTensor) else x for x in run.objective.parameters())
    sizes = sum(x.numel() for x in local)
    return {"wrapper": wrapper, "read": read, "step": result.progress.step, "sizes": sizes, "rank": rank}


def refused(rank: int, configs: list[RunConfig], error: type[Exception]) -> str:
    """What one says to its own configuration."""
    try:
        loop.run(configs[rank], resume=True)
    except error as caught:
        return str(caught)
    return ""


def serve(rank: int, port: int, connection: Any) -> None:
    """Runs what it is sent, until it is killed."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((function(rank, *arguments), None))
        except Exception:
            connection.send((None, traceback.format_exc()))


class Processes:
    """Two, started once for all tests."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes, self.connections = [], []
        port = free_port()
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, port, there))  # not daemons: they have readers
            process.start()
            self.processes.append(process)
            self.connections.append(here)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(rank, *arguments) of both."""
        for connection in self.connections:
            connection.send((function, arguments))
        results, failures = [], []
        for connection in self.connections:
            if not connection.poll(SECONDS):
                self.stop()
                pytest.fail(f"no answer within {SECONDS} seconds")
            result, failure = connection.recv()
            results.append(result)
            failures += [failure] if failure is not None else []
        if failures:
            self.stop()
            pytest.fail("\n".join(failures))
        return results


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    result = Processes()
    yield result
    result.stop()


# ---- comparisons -----------------------------------------------------------------------------------------------------


def assert_same_figures(out: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Line by line of the log."""
    found = figures(out)
    assert len(found) == len(figures(expected)) > 0
    for one, other in zip(found, figures(expected), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[name], abs=tolerance), (one["step"], name)
            else:
                assert value == other[name], (one["step"], name)


def assert_same_weights(out: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Of the last checkpoints."""
    one, other = (load_file(each / "checkpoints" / names(each)[-1] / "model.safetensors") for each in (out, expected))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() < tolerance, name


# ---- the same run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """One process with the whole batch, and with everything that makes a run hard to repeat."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "alone"
    loop.run(config_of(out, corpus, batch=TWO))
    return out


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_same_run(wrapper: str, alone: Path, corpus: Path, processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    """Losses, evaluations and weights; each process reads its own packs, which together are the stream."""
    out = tmp_path / "run"
    config = config_of(out, corpus, batch=TWO, train={"fsdp": wrapper == "fsdp"})
    answers = processes.run(train, config)
    assert [answer["wrapper"] for answer in answers] == [wrapper, wrapper]
    assert_same_figures(out, alone)
    assert_same_weights(out, alone)
    assert names(out) == names(alone)
    steps = [one + other for one, other in zip(*(answer["read"] for answer in answers), strict=True)]
    assert [sorted(step) for step in steps] == [
        *([(0, 4 * step + i) for i in range(4)] for step in range(5)),
        *([(1, 4 * step + i) for i in range(4)] for step in range(4)),
    ]
    whole = sum(x.numel() for x in load_file(out / "checkpoints" / names(out)[-1] / "model.safetensors").values())
    sizes = [answer["sizes"] for answer in answers]
    assert sum(sizes) == (whole if wrapper == "fsdp" else 2 * whole)
    if wrapper == "fsdp":
        assert max(sizes) < 0.6 * whole


@pytest.mark.parametrize(("first", "second"), [("none", "ddp"), ("ddp", "fsdp"), ("fsdp", "none")])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_checkpoints_of_others(
    first: str,
    second: str,
    optimizer: str,
    corpus: Path,  # noqa: F811
    processes: Processes,
    tmp_path: Path,
) -> None:
    """A run may change its number of processes, and how they share the model, whenever it is gone on with."""

    def go(out: str, wrapper: str, steps: int) -> None:
        config = simple(
            tmp_path / out,
            corpus,
            schedule={"steps": steps, **STEADY},
            batch=TWO,
            train={"fsdp": wrapper == "fsdp"},
            optimizer={"name": optimizer, "learning_rate": 3e-3},
        )
        if wrapper == "none":
            train(0, config, True)
        else:
            assert {answer["wrapper"] for answer in processes.run(train, config, True)} == {wrapper}

    go("whole", "none", 4)
    go("parts", first, 2)
    go("parts", second, 4)
    ends = [{**entry, "progress": None} for entry in figures(tmp_path / "parts", "step")]
    expected = [{**entry, "progress": None} for entry in figures(tmp_path / "whole", "step")]
    assert [entry["step"] for entry in ends] == [1, 2, 3, 4]
    for one, other in zip(ends, expected, strict=True):
        assert one["mlm_loss"] == pytest.approx(other["mlm_loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_bfloat16(wrapper: str, corpus: Path, processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    """Near the losses in float32, and not the same; with activations that are computed twice."""
    options: dict[str, Any] = {"fsdp": wrapper == "fsdp", "activation_checkpointing": True}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        processes.run(train, simple(out, corpus, batch=TWO, train={**options, "precision": precision}))
    weights = load_file(tmp_path / "bf16" / "checkpoints" / "step-00000009" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    pairs = zip(figures(tmp_path / "bf16"), figures(tmp_path / "fp32"), strict=True)
    differences = [abs(one["mlm_loss"] - other["mlm_loss"]) for one, other in pairs]
    assert 0 < max(differences) < 0.05


def test_readers_beside(alone: Path, corpus: Path, processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    """What workers of two processes read is the same."""
    out = tmp_path / "run"
    data = {"corpus": str(corpus), "duplicates": 2, "workers": 1}
    loop_config = config_of(out, corpus, batch=TWO, data=data)
    processes.run(train, loop_config)
    assert_same_figures(out, alone)


def test_minutes(corpus: Path, processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    """Both end at the same step, when the first one's time is over."""
    config = simple(tmp_path / "run", corpus, batch=TWO, schedule={"steps": None, "minutes": 1 / 60})
    answers = processes.run(train, config)
    assert answers[0]["step"] == answers[1]["step"] > 5
    assert figures(tmp_path / "run", "step")[-1]["progress"] == 1


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_packs_that_cannot_be_shared(corpus: Path, processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    config = simple(tmp_path / "run", corpus)
    for message in processes.run(refused, [config, config], ConfigError):
        assert message.startswith("phases[0].tokens_per_step is 633, which makes 3 packs")
        assert "2 processes cannot share them evenly" in message


def test_folders_that_are_not_shared(corpus: Path, processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    """An error, before anybody waits for the other."""
    configs = [simple(tmp_path / out, corpus, batch=TWO, schedule={"steps": 1}) for out in ("here", "there")]
    loop.run(configs[0])
    for message in processes.run(refused, configs, CheckpointError):
        assert "processes see different checkpoints" in message


# ---- a process that dies ---------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from bert_fast.pretraining import config, loop
from bert_fast.pretraining.tally import Tally

def main():
    torch.set_num_threads(1)
    found = config.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    mark, original, calls = Path(sys.argv[1] + ".died"), Tally.add, []

    def add(self, *losses):
        calls.append(None)
        # In the fifth step, in front of its second pack.
        if os.environ["RANK"] == "1" and len(calls) == 4 * 2 + 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *losses)

    Tally.add = add
    if os.environ["RANK"] == "0" and mark.exists():
        time.sleep(1)  # so that the other one comes first, to a store that may still know the dead
    loop.run(found, resume=True)

if __name__ == "__main__":
    main()
"""


def test_restarted(alone: Path, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """torchrun starts both again, and they go on from the last checkpoint to the same end."""
    out = tmp_path / "run"
    script, values = tmp_path / "script.py", tmp_path / "config.json"
    script.write_text(SCRIPT)
    values.write_text(json.dumps(dump(config_of(out, corpus, batch=TWO))))
    root = str(Path(loop.__file__).parents[2])
    path = os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--monitor-interval", "0.1"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, str(script), str(values)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends what it has started
        process.communicate(timeout=SECONDS)
        raise
    assert process.returncode == 0, errors
    assert values.with_name("config.json.died").exists()
    starts = [entry["step"] for entry in figures(out, "start")]
    assert starts == [0, 3]
    assert_same_figures(out, alone)
    assert_same_weights(out, alone)

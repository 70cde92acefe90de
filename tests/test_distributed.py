"""Swapped models in two processes: DDP, FSDP and tensor parallelism against one process with the whole batch."""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    any_path,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    randomise,
    transformers,  # noqa: F401
)
from test_frameworks import build
from test_swap import calls
from tolerance import magnitude
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import bert_fast
from bert_fast.swap.core import Swapped

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")

SECONDS = 60

NAMES = ("BertForSequenceClassification", "RobertaForSequenceClassification")

# Each process has as many texts as the other, so that the mean of means is the mean; together they are ragged.
ROWS = """
    1111111111111
    0001111111111
    1101100111010
    1110000000000
    1111111111100
    1000000000000
    0000011111111
    1111000000000
"""
LABELS = torch.tensor([0, 2, 1, 0, 1, 1, 2, 0])

Answer = dict[str, Any]


class Rank:
    """What a process has: its half of the batch, and what one process makes of the whole."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.mesh = init_device_mesh("cpu", (2,))

    def batch(self) -> dict[str, Tensor]:
        half = slice(4 * self.number, 4 * self.number + 4)
        return {key: x[half] for key, x in whole_batch().items()}

    def compare(self, model: Any, wrapped: nn.Module, step: float = 0.02) -> Answer:
        """Trains the wrapped model and, on the whole batch, a copy of the original one: outputs and gradients.

        Args:
            model: whose weights the original has.
            wrapped: gives the same outputs, for this process's half of the batch.
            step: of the optimizer.
        """
        found: Answer = {}
        original = copy.deepcopy(model)
        half = slice(4 * self.number, 4 * self.number + 4)
        found["logits"], found["gradients"] = train(wrapped, self.batch(), step)
        logits, found["expected gradients"] = train(original, whole_batch(), step)
        found["expected"] = [x[half] for x in logits]
        return found


def train(model: Any, batch: dict[str, Tensor], step: float) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits before and after each of two steps, and the gradients of the second."""
    optimizer = torch.optim.SGD(model.parameters(), lr=step)
    logits: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()  # not the model's: after a call without gradients that has its parameters whole
        with any_path():
            output = model(**batch)
        output.loss.backward()
        grads = {plain_name(key): whole(x.grad) for key, x in model.named_parameters() if x.grad is not None}
        optimizer.step()
        with torch.no_grad():
            logits += [output.logits.detach(), model(**batch).logits]
    return logits, {key: x.clone() for key, x in grads.items()}


def whole_batch() -> dict[str, Tensor]:
    batch = inputs(mask_of(ROWS))
    return batch | {"labels": LABELS}


def whole(x: Any) -> Tensor:
    """Of a tensor that may be in parts."""
    result: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return result


def plain_name(name: str) -> str:
    """What a parameter is called where nothing wraps the model."""
    return name.replace("module.", "").replace("_fsdp_wrapped_", "")


# ---- what the processes run ------------------------------------------------------------------------------------------


def with_paths(found: Answer, model: nn.Module) -> Answer:
    return found | {"calls": calls(model)}


def ddp(rank: Rank, name: str, is_before: bool) -> Answer:
    """The second process starts from other weights, packed already: wrapped, it gets the first one's."""
    model = build(name)
    inner = copy.deepcopy(model)
    if rank.number == 1:
        randomise(inner, seed=8)
    if is_before:
        bert_fast.swap(inner)
        with torch.no_grad():
            inner(**rank.batch())
    wrapped = DistributedDataParallel(inner)
    if not is_before:
        bert_fast.swap(wrapped)
    return with_paths(rank.compare(model, wrapped), inner)


def shard(rank: Rank, name: str, parts: tuple[str, ...], is_before: bool) -> Answer:
    """fully_shard of the parts, from the leaves up."""
    model = build(name)
    sharded = copy.deepcopy(model)
    if is_before:
        bert_fast.swap(sharded)
    base = sharded.base_model
    for part in parts:
        for path in ("encoder.layer.0", "encoder.layer.1") if part == "layers" else (part,):
            fully_shard(sharded if path == "root" else base.get_submodule(path), mesh=rank.mesh)
    if not is_before:
        bert_fast.swap(sharded)
    found = with_paths(rank.compare(model, sharded), sharded)
    bert_fast.restore(sharded)
    logits = sharded(**rank.batch()).logits
    return found | {
        "restored": logits.detach(),
        "is sharded": [isinstance(sharded.get_submodule(path), FSDPModule) for path in sharded_paths(sharded, parts)],
        "is swapped": any(isinstance(module, Swapped) for module in sharded.modules()),
    }


def sharded_paths(model: Any, parts: tuple[str, ...]) -> list[str]:
    prefix = model.base_model_prefix
    inner = {"": prefix, "root": "", "layers": f"{prefix}.encoder.layer.0"}
    return [inner.get(part, f"{prefix}.{part}") for part in parts]


def flat_shards(rank: Rank, name: str, use_orig_params: bool) -> Answer:
    """The first FSDP, around the whole model: gradients are compared by what a step makes of them."""
    model = build(name)
    inner = bert_fast.swap(copy.deepcopy(model))
    wrapped = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    found = with_paths(rank.compare(model, wrapped), inner)
    return found | {"gradients": None}


def split_weights(rank: Rank, name: str) -> Answer:
    """The feed-forward weights in two; both processes have the whole batch."""
    model = build(name, intermediate_size=74)
    split = bert_fast.swap(copy.deepcopy(model))
    for layer in split.base_model.encoder.layer:
        parallelize_module(
            layer, rank.mesh, {"intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel()}
        )
    found: Answer = {}
    for each, keys in ((split, ("logits", "gradients")), (model, ("expected", "expected gradients"))):
        with any_path():
            output = each(**whole_batch())
            grads = {key: whole(x) for key, x in gradients(each, output.loss).items()}
        found |= dict(zip(keys, ([output.logits.detach()], grads), strict=True))
    return with_paths(found, split)


def without_the_root(rank: Rank, name: str) -> Answer:
    """The encoder's weights are in parts until the model around it is called: an error, as of the original."""
    errors = []
    for model in (build(name), bert_fast.swap(build(name))):
        fully_shard(model, mesh=rank.mesh)
        for has_grad in (True, False):
            try:
                with torch.set_grad_enabled(has_grad):
                    model.base_model(rank.batch()["input_ids"])
            except RuntimeError as error:
                errors.append(str(error))
    return {"errors": errors}


def answer(rank: Rank, model: Any) -> Answer:
    """Of a model that comes by pickle."""
    with torch.no_grad():
        logits = model(**rank.batch()).logits
    return with_paths({"logits": logits, "is swapped": isinstance(model, Swapped)}, model)


def serve(number: int, store: str, connection: Connection) -> None:
    """Runs what it is sent, until it is killed."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=timedelta(seconds=SECONDS / 2)
    )
    rank = Rank(number)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((function(rank, *arguments), None))
        except Exception:
            connection.send((None, traceback.format_exc()))


# ---- the processes ---------------------------------------------------------------------------------------------------


class Processes:
    """Two, started once for all tests, and again after one that hung."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = 0
        self.processes: list[Any] = []
        self.connections: list[Any] = []

    def start(self) -> None:
        self.started += 1
        context = multiprocessing.get_context("spawn")
        for number in range(2):
            here, there = context.Pipe()
            arguments = (number, str(self.folder / f"store{self.started}"), there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        self.processes, self.connections = [], []

    def run(self, function: Callable[..., Answer], *arguments: Any) -> list[Answer]:
        """function(rank, *arguments) of both."""
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((function, arguments))
        results: list[Answer] = []
        failures = []
        for connection in self.connections:
            if not connection.poll(SECONDS):
                self.stop()
                pytest.fail(f"no answer within {SECONDS} seconds")
            result, failure = connection.recv()
            results.append(result)
            if failure is not None:
                failures.append(failure)
        if failures:
            self.stop()
            pytest.fail("\n".join(failures))
        return results


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    result = Processes(tmp_path_factory.mktemp("distributed"))
    yield result
    result.stop()


def assert_same(answers: list[Answer], path: str) -> None:
    """Outputs before and after a step, the gradients, and the way that the calls went."""
    for answer in answers:
        for found, expected in zip(answer["logits"], answer["expected"], strict=True):
            assert_near(found, expected)
        if answer["gradients"] is not None:
            assert_same_gradients(answer["gradients"], answer["expected gradients"])
        assert list(answer["calls"]) == [path]
    if len(answers[0]["logits"]) > 1:
        assert magnitude(answers[0]["logits"][0] - answers[0]["logits"][1]) > 0.01, "no step was taken"


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_before", [True, False], ids=["swap first", "wrap first"])
@pytest.mark.parametrize("name", NAMES)
def test_data_parallel(name: str, is_before: bool, processes: Processes) -> None:
    assert_same(processes.run(ddp, name, is_before), "fast")


SHARDS: dict[str, tuple[tuple[str, ...], str]] = {
    "root": (("root",), "fast"),
    "encoder": (("", "root"), "fast"),
    "layers": (("layers", "root"), "encoder.layer.0 has hooks"),
    "leaf": (("encoder.layer.1.output.dense", "root"), "encoder.layer.1.output.dense has hooks"),
    "embeddings": (("embeddings.word_embeddings", "root"), "embeddings.word_embeddings has hooks"),
}


@pytest.mark.parametrize("is_before", [True, False], ids=["swap first", "shard first"])
@pytest.mark.parametrize(("parts", "path"), SHARDS.values(), ids=SHARDS)
def test_fully_sharded(parts: tuple[str, ...], path: str, is_before: bool, processes: Processes) -> None:
    answers = processes.run(shard, NAMES[is_before], parts, is_before)
    assert_same(answers, path)
    for answer in answers:
        assert_near(answer["restored"], answer["expected"][-1])
        assert all(answer["is sharded"])
        assert not answer["is swapped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the first FSDP takes to a GPU where there is one")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_shards(use_orig_params: bool, processes: Processes) -> None:
    assert_same(processes.run(flat_shards, NAMES[0], use_orig_params), "fast")


def test_tensor_parallel(processes: Processes) -> None:
    assert_same(processes.run(split_weights, NAMES[1]), "encoder.layer.0.intermediate.dense has hooks")


def test_sharded_encoder_alone(processes: Processes) -> None:
    for answer in processes.run(without_the_root, NAMES[0]):
        assert len(answer["errors"]) == 4


@pytest.mark.parametrize("name", NAMES)
def test_pickled(name: str, processes: Processes) -> None:
    """Into processes that have swapped nothing of the kind, maybe."""
    swapped = bert_fast.swap(build(name))
    with torch.no_grad():
        swapped(**whole_batch())
    answers = processes.run(answer, swapped)
    assert_near(torch.cat([x["logits"] for x in answers]), build(name)(**whole_batch()).logits.detach())
    for each in answers:
        assert each["is swapped"]
        assert each["calls"] == {"fast": 2}

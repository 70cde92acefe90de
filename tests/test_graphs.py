"""CUDA graphs: buckets, what a replay reads and leaves alone. Without a GPU a graph is a call that is made again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bert_fast
from bert_fast import graphs, ops

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = {"vocab_size": 97, "hidden_size": 34, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 41}


def call_again(function: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], object]]:  # noqa: ARG001
    """What a graph does: the same work on the same memory, and the result where the first one was."""
    out = function()
    return out, lambda: out.copy_(function())


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval().to(DEVICE)
    bert_fast.swap(model, cuda_graphs=True)
    if DEVICE == "cpu":
        model.bert_fast_graphs.capture = call_again
    return model


def batch_of(*lengths: int, width: int | None = None) -> dict[str, Tensor]:
    columns = max(lengths) if width is None else width
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(0, 97, (len(lengths), columns), generator=generator)
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long(), "token_type_ids": ids % 2}
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def run(model: Any, batch: dict[str, Tensor]) -> Any:
    with torch.no_grad(), ops.forced_path("triton"):
        return model(**batch)


def without_graphs(model: Any, batch: dict[str, Tensor]) -> Any:
    plain = copy.deepcopy(model)
    bert_fast.swap(plain, cuda_graphs=False)
    return run(plain, batch)


@pytest.mark.parametrize(("count", "bucket"), [(1, 16), (16, 16), (17, 32), (128, 128), (129, 160), (1025, 1280)])
def test_buckets(count: int, bucket: int) -> None:
    assert graphs.bucket_of(count) == bucket


def test_buckets_are_few_and_hardly_too_large() -> None:
    buckets = {graphs.bucket_of(count) for count in range(1, graphs.MAX_TOKENS + 1)}
    assert len(buckets) <= 32
    assert all(count <= graphs.bucket_of(count) <= max(1.25 * count, count + 15) for count in range(1, 5000))


@pytest.mark.parametrize("lengths", [(5,), (7, 3, 1), (33, 2), (70,), (16,), (3, 0, 2)], ids=str)
def test_a_replay_gives_what_a_call_gives(model: Any, lengths: tuple[int, ...]) -> None:
    for batch in (batch_of(*lengths), batch_of(*lengths, width=71)):
        found, expected = run(model, batch), without_graphs(model, batch)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    assert len(model.bert_fast_graphs) >= 1


def test_batches_of_a_bucket_share_a_graph(model: Any) -> None:
    runs = [run(model, batch_of(*lengths)) for lengths in ((9, 4), (4, 9), (7, 7), (16,))]
    assert len(model.bert_fast_graphs) <= 2  # one text has a tile less than two
    for lengths, output in zip(((9, 4), (4, 9), (7, 7), (16,)), runs, strict=True):
        expected = without_graphs(model, batch_of(*lengths))
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)  # later replays left it alone


def test_without_token_types_there_is_another_graph(model: Any) -> None:
    batch = batch_of(9, 4)
    run(model, batch)
    del batch["token_type_ids"]
    torch.testing.assert_close(run(model, batch)[0], without_graphs(model, batch)[0])
    assert len(model.bert_fast_graphs) == 2


def test_position_ids(model: Any) -> None:
    batch = batch_of(9, 4)
    batch["position_ids"] = torch.arange(9, device=DEVICE)[None] + 20
    torch.testing.assert_close(run(model, batch)[0], without_graphs(model, batch)[0])


def test_weights_changed_in_place_are_seen(model: Any) -> None:
    batch = batch_of(9, 4)
    before = run(model, batch)[0]
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(20.0)
    after = run(model, batch)[0]
    assert not torch.allclose(before, after)
    assert len(model.bert_fast_graphs) == 1
    torch.testing.assert_close(after, without_graphs(model, batch)[0])


def test_weights_that_moved_need_another_graph(model: Any) -> None:
    batch = batch_of(9, 4)
    run(model, batch)
    layer = model.encoder.layer[0].output.dense
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    torch.testing.assert_close(run(model, batch)[0], without_graphs(model, batch)[0])
    assert len(model.bert_fast_graphs) == 2


def test_another_structure_needs_another_graph(model: Any) -> None:
    batch = batch_of(9, 4)
    run(model, batch)
    model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
    torch.testing.assert_close(run(model, batch)[0], without_graphs(model, batch)[0])
    model.encoder.layer[0].output.LayerNorm.eps = 0.5
    torch.testing.assert_close(run(model, batch)[0], without_graphs(model, batch)[0])
    assert len(model.bert_fast_graphs) == 3


def test_the_least_used_graph_goes(model: Any) -> None:
    model.bert_fast_graphs.max_graphs = 2
    for length in (5, 20, 5, 40, 5):
        run(model, batch_of(length))
    assert len(model.bert_fast_graphs) == 2
    assert {key.tokens for key in model.bert_fast_graphs._graphs} == {16, 48}


def test_calls_that_no_graph_serves(model: Any) -> None:
    batch = batch_of(9, 4)
    with ops.forced_path("triton"):
        assert model(**batch).last_hidden_state.requires_grad
        with torch.no_grad():
            model(**batch, output_hidden_states=True)
            model.bert_fast_graphs.max_tokens = 12
            model(**batch)
            model.train()
            model(**batch)
    assert len(model.bert_fast_graphs) == 0


def test_copies_make_graphs_of_their_own(model: Any) -> None:
    run(model, batch_of(9))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other.bert_fast_graphs) == 0
        assert other.bert_fast_graphs.max_tokens == model.bert_fast_graphs.max_tokens


def test_swap_again_and_restore_end_it(model: Any) -> None:
    bert_fast.swap(model, cuda_graphs=True)
    assert "bert_fast_graphs" in model.__dict__
    bert_fast.swap(model)
    assert "bert_fast_graphs" not in model.__dict__
    bert_fast.swap(model, cuda_graphs=True)
    bert_fast.restore(model)
    assert "bert_fast_graphs" not in model.__dict__

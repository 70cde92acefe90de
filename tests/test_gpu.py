"""What only a GPU can show: repeatability, tensors beyond 2^31 elements, streams, graphs, autocast, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bert_fast
from bert_fast import functional, masking
from bert_fast.config import BertConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BF16 = torch.bfloat16
LENGTHS = torch.tensor([1, 512, 64, 65, 3, 200, 128, 31])


def on_gpu(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device="cuda")


def packed(lengths: Tensor) -> masking.PackedBatch:
    return masking.unpad((torch.arange(int(lengths.max())) < lengths[:, None]).long(), device="cuda")


def attend(q: Tensor, k: Tensor, v: Tensor, batch: masking.PackedBatch, **options: Any) -> Tensor:
    return functional.attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, tiles=batch.tiles, **options)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def attention_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    batch = packed(LENGTHS)
    q, k, v = (on_gpu(batch.total_tokens, 12, 64, seed=seed) for seed in range(3))
    seed = torch.tensor([7], device="cuda")
    bias = on_gpu(12, 1023, dtype=torch.float32, seed=4)
    return lambda q, k, v, bias: attend(q, k, v, batch, dropout_p=0.1, seed=seed, bias=bias), leaves(q, k, v, bias)


def layer_norm_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    x, residual = on_gpu(4096, 768), on_gpu(4096, 768, seed=1)
    weight, bias, input_bias = (on_gpu(768, dtype=torch.float32, seed=seed) for seed in (2, 3, 4))
    seed = torch.tensor([7], device="cuda")

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor) -> Tensor:
        return functional.layer_norm(
            x, weight, bias, 1e-12, residual, input_bias=input_bias, dropout_p=0.1, seed=seed, stream=1
        )

    return call, leaves(x, residual, weight, bias, input_bias)


def gelu_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    return functional.gelu, leaves(on_gpu(4096, 3072), on_gpu(3072, seed=1))


def embedding_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    tables = (on_gpu(1000, 768), on_gpu(512, 768, seed=1), on_gpu(2, 768, seed=2))
    weight, bias = on_gpu(768, seed=3), on_gpu(768, seed=4)
    ids = torch.randint(0, 1000, (8192,), device="cuda")
    seed = torch.tensor([7], device="cuda")

    def call(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.embedding(
            word, position, token_type, ids, ids % 512, ids % 2, weight, bias, padding_idx=0, dropout_p=0.1, seed=seed
        )

    return call, leaves(*tables, weight, bias)


def loss_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    targets = torch.randint(0, 30522, (3000,), device="cuda")
    call = functional.linear_cross_entropy
    x, weight, bias = on_gpu(3000, 768) * 0.1, on_gpu(30522, 768, seed=1) * 0.1, on_gpu(30522, seed=2)
    return lambda x, weight, bias: call(x, weight, bias, targets), leaves(x, weight, bias)


CASES = {
    "attention": attention_case,
    "layer_norm": layer_norm_case,
    "gelu": gelu_case,
    "embedding": embedding_case,
    "linear_cross_entropy": loss_case,
}


def run(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = call(*inputs)
    grad = torch.ones_like(out) if out.dim() == 0 else on_gpu(*out.shape, dtype=out.dtype, seed=9)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_runs_agree_bit_for_bit(name: str) -> None:
    call, inputs = CASES[name]()
    first = run(call, inputs)
    for _ in range(100):
        for x, y in zip(run(call, inputs), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", CASES)
def test_another_stream(name: str) -> None:
    call, inputs = CASES[name]()
    expected = run(call, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(call, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(name: str) -> None:
    call, inputs = CASES[name]()
    run(call, inputs)  # compiled by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["attention", "layer_norm", "gelu"])
def test_a_cuda_graph_replays_forward_and_backward(name: str) -> None:
    call, inputs = CASES[name]()
    expected = run(call, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(call, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    grad = on_gpu(*expected[0].shape, dtype=expected[0].dtype, seed=9)
    with torch.cuda.graph(graph):
        out = call(*inputs)
        found = [out, *torch.autograd.grad(out, inputs, grad)]
    for x in found:
        x.detach().zero_()
    graph.replay()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_a_graph_draws_new_dropout_at_every_replay() -> None:
    batch = packed(LENGTHS)
    q = on_gpu(batch.total_tokens, 12, 64)
    attend(q, q, q, batch, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, q, q, batch, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_rows_beyond_2_to_the_31_elements() -> None:
    """The last rows of tensors whose offsets do not fit 32 bits."""
    width = 8192
    rows = 2**31 // width + 40
    if torch.cuda.get_device_properties(0).total_memory < 20 * rows * width:
        pytest.skip("not enough memory on the device")
    x = torch.empty(rows, width, dtype=BF16, device="cuda").normal_()
    weight, bias = on_gpu(width, dtype=torch.float32), on_gpu(width, dtype=torch.float32, seed=1)
    tail = x[-64:].clone()
    assert torch.equal(functional.layer_norm(x, weight, bias)[-64:], functional.layer_norm(tail, weight, bias))
    assert torch.equal(functional.gelu(x, bias)[-64:], functional.gelu(tail, bias))
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(functional.layer_norm(leaf, weight, bias), leaf, x.detach())
    short = tail.requires_grad_()
    (expected,) = torch.autograd.grad(functional.layer_norm(short, weight, bias), short, tail.detach())
    assert torch.equal(grad[-64:], expected)


def test_attention_beyond_2_to_the_31_elements() -> None:
    tokens, heads, head_size = 2**31 // (16 * 128) + 512, 16, 128
    if torch.cuda.get_device_properties(0).total_memory < 12 * tokens * heads * head_size:
        pytest.skip("not enough memory on the device")
    lengths = torch.full((tokens // 512,), 512)
    batch = packed(lengths)
    x = torch.empty(int(lengths.sum()), heads, head_size, dtype=BF16, device="cuda").normal_()
    tail = x[-512:].clone()
    expected = attend(tail, tail, tail, packed(lengths[-1:]))
    assert torch.equal(attend(x, x, x, batch)[-512:], expected)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 4097, 8192])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_long_rows(length: int, dtype: torch.dtype) -> None:
    batch = packed(torch.tensor([length, 5]))
    q, k, v = leaves(*(on_gpu(length + 5, 2, 64, dtype=dtype, seed=seed) for seed in range(3)))
    out = attend(q, k, v, batch)
    grad = on_gpu(*out.shape, dtype=dtype, seed=5)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    exact = leaves(*(x[:length].double() for x in (q, k, v)))
    query, key, value = (x.transpose(0, 1) for x in exact)
    truth = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(0, 1)
    truths = torch.autograd.grad(truth, exact, grad[:length].double())
    bound = {BF16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    for found, expected in zip((out, *grads), (truth, *truths), strict=True):
        error = (found[:length].double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert float(error) <= bound


def test_activation_checkpointing_draws_the_same_dropout() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=1, intermediate_size=256)
    layer = bert_fast.BertModel(config).cuda().train().layers[0]
    batch = packed(LENGTHS)
    x = on_gpu(batch.total_tokens, 128, dtype=torch.float32).requires_grad_()
    results = []
    calls: tuple[Callable[..., Tensor], ...] = (layer, lambda *args: checkpoint(layer, *args, use_reentrant=False))
    for call in calls:
        torch.manual_seed(1)
        out = call(x, batch)
        results.append([out, *torch.autograd.grad(out, (x, *layer.parameters()), torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2)).cuda().eval()
    mask = (torch.arange(128, device="cuda") < torch.tensor([[128], [17], [60]], device="cuda")).long()
    ids = torch.randint(0, 30522, mask.shape, device="cuda")
    with torch.no_grad():
        truth = model.double()(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        model.float()
        with torch.autocast("cuda", dtype):
            theirs = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
            ours = bert_fast.swap(model)(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert ours.dtype == theirs.dtype
    assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()


def test_swapped_graphs() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=3)).cuda().eval().to(BF16)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(30):
        lengths = torch.randint(1, 200, (int(torch.randint(1, 9, (), generator=generator)), 1), generator=generator)
        mask = (torch.arange(int(lengths.max())) < lengths).long()
        batches.append({"input_ids": torch.randint(0, 30522, mask.shape).cuda(), "attention_mask": mask.cuda()})
    with torch.no_grad():
        bert_fast.swap(model)
        expected = [model(**batch) for batch in batches]
        bert_fast.swap(model, cuda_graphs=True)
        found = [model(**batch) for batch in batches]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.last_hidden_state, y.last_hidden_state, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(x.pooler_output, y.pooler_output, rtol=2e-2, atol=2e-2)

"""Attention against torch's varlen_attn, FlashAttention-2, dense SDPA and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast import functional, masking, ops

from ..workloads import right_padded
from .measure import Bench, Calls, Contender, Skip, compiled
from .report import Record

DROPOUT = 0.1
VERIFIED = 8  # sequences that are compared with the reference, from the first on

SDPA_BACKENDS = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def uniform(low: int, high: int, tokens: int) -> Tensor:
    """Lengths between low and high that add up to about so many tokens."""
    count = max(2, round(2 * tokens / (low + high)))
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(0))


def full(length: int, tokens: int) -> Tensor:
    return torch.full((max(1, tokens // length),), length)


@dataclass
class Packed:
    """Inputs of one attention call; q, k, v and grad are (tokens, heads, head_size)."""

    batch: masking.PackedBatch
    lengths: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    @property
    def flops(self) -> float:
        """Of the forward pass: two products; the backward pass needs five."""
        return 4.0 * float((self.lengths.double() ** 2).sum()) * self.q.shape[1] * self.q.shape[2]

    @property
    def tensor_bytes(self) -> float:
        return float(self.q.numel() * self.q.element_size())

    def dense(self, x: Tensor) -> Tensor:
        """(sequences, heads, length, head_size) where all lengths are one."""
        return self.batch.pad(x).transpose(1, 2).contiguous()

    def sparse(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    @property
    def is_full(self) -> bool:
        return bool((self.lengths == self.lengths[0]).all())


def pack(bench: Bench, lengths: Tensor, heads: int, head_size: int = 64) -> Packed:
    batch = masking.unpad(right_padded(lengths), device=bench.device)
    shape = (batch.total_tokens, heads, head_size)
    return Packed(batch, lengths, *(bench.randn(*shape) for _ in range(4)))


def input_sets(bench: Bench, lengths: Tensor, heads: int) -> list[Packed]:
    first = pack(bench, lengths, heads)
    return [first, *(pack(bench, lengths, heads) for _ in range(bench.input_sets(4 * first.tensor_bytes) - 1))]


# ---- the reference ---------------------------------------------------------------------------------------------------


def kept_probabilities(p: Packed, seed: Tensor) -> Tensor:
    """(tokens, heads, max_seqlen) bool, which keys dropout leaves to each query: values that are unit vectors say."""
    size = p.q.shape[2]
    blocks = []
    for first in range(0, p.batch.max_seqlen, size):
        units = (p.batch.positions[:, None] - first == torch.arange(size, device=p.q.device)).to(p.q.dtype)
        values = units[:, None].expand(p.q.shape).contiguous()
        blocks.append(_ours(p, values, seed=seed, dropout_p=DROPOUT) != 0)
    return torch.cat(blocks, 2)


def expected(p: Packed, kept: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The result, and the gradients of q, k and v, of the first sequences, in float64."""
    bounds = p.batch.cu_seqlens[: VERIFIED + 1].tolist()
    q, k, v = (x[: bounds[-1]].double().requires_grad_() for x in (p.q, p.k, p.v))
    outputs = []
    for start, stop in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * p.scale
        probs = torch.softmax(scores, -1)
        if kept is not None:
            probs = probs * kept[start:stop, :, : stop - start].transpose(0, 1) / (1 - DROPOUT)
        outputs.append(torch.einsum("hqk,khd->qhd", probs, v[start:stop]))
    out = torch.cat(outputs)
    grads = torch.autograd.grad(out, (q, k, v), p.grad[: bounds[-1]].double())
    return [out.detach()], list(grads)


def first_rows(p: Packed) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Cuts results down to what `expected` has."""
    end = int(p.batch.cu_seqlens[: VERIFIED + 1][-1])
    return lambda results: [x[:end] for x in results]


# ---- the contenders --------------------------------------------------------------------------------------------------


def _ours(p: Packed, v: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    batch = p.batch
    return functional.attention(
        p.q, p.k, p.v if v is None else v, batch.cu_seqlens, batch.max_seqlen, tiles=batch.tiles, seed=seed,
        dropout_p=dropout_p,
    )  # fmt: skip


def _our_forward(p: Packed, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Also the log-sum-exp."""
    return ops.launch_attention(p.q, p.k, p.v, p.batch.tiles, p.batch.max_seqlen, p.scale, seed, 0, dropout_p)


def _our_backward(
    p: Packed, out: Tensor, lse: Tensor, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    return ops.launch_attention_backward(
        p.grad, p.q, p.k, p.v, out, lse, p.batch.tiles, p.batch.max_seqlen, p.scale, seed, 0, dropout_p
    )[:3]


def _our_both(p: Packed, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    return _our_backward(p, *_our_forward(p, seed, dropout_p), seed, dropout_p)


def _flash_forward(p: Packed, dropout_p: float) -> Any:
    batch = p.batch
    return torch.ops.aten._flash_attention_forward(
        p.q, p.k, p.v, batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen, dropout_p, False, False,
        scale=p.scale,
    )  # fmt: skip


def _flash_backward(p: Packed, forward: Any, dropout_p: float) -> Any:
    out, lse, state, unused, _ = forward
    batch = p.batch
    return torch.ops.aten._flash_attention_backward(
        p.grad, p.q, p.k, p.v, out, lse, batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen,
        dropout_p, False, state, unused, scale=p.scale,
    )  # fmt: skip


def flash(bench: Bench, sets: list[Packed], direction: str, dropout_p: float = 0.0) -> Contender:
    """FlashAttention-2 on packed sequences, as torch carries it."""

    def make() -> Calls:
        bench.need_cuda()
        if direction == "forward":
            return [partial(_flash_forward, p, dropout_p) for p in sets]
        if direction == "backward":
            return [partial(_flash_backward, p, _flash_forward(p, dropout_p), dropout_p) for p in sets]
        return [lambda p=p: _flash_backward(p, _flash_forward(p, dropout_p), dropout_p) for p in sets]  # type: ignore[misc]

    cut = first_rows(sets[0])
    result = (lambda found: cut(found[:1])) if direction == "forward" else cut
    name = "FA2 varlen" if dropout_p == 0.0 else "FA2 varlen with dropout"
    return Contender(name, result=None if dropout_p > 0 else result, make=make)


def varlen(bench: Bench, sets: list[Packed]) -> Contender:
    def make() -> Calls:
        bench.need_cuda()
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            raise Skip("this torch has no torch.nn.attention.varlen") from None
        return [
            partial(
                varlen_attn, p.q, p.k, p.v, p.batch.cu_seqlens, p.batch.cu_seqlens, p.batch.max_seqlen,
                p.batch.max_seqlen,
            )
            for p in sets
        ]  # fmt: skip

    cut = first_rows(sets[0])
    return Contender("varlen_attn", result=lambda found: cut([found]), make=make)


def flex(bench: Bench, sets: list[Packed]) -> Contender:
    """FlexAttention; each token sees those of its sequence, by a block mask that is made beforehand."""

    def make() -> Calls:
        bench.need_cuda()
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        attend = compiled(bench, flex_attention)
        calls = []
        for p in sets:
            numbers = torch.arange(len(p.lengths)).repeat_interleave(p.lengths).to(bench.device)

            def is_visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor, numbers: Tensor = numbers) -> Tensor:
                return numbers[q] == numbers[k]

            tokens = p.batch.total_tokens
            mask = create_block_mask(is_visible, None, None, tokens, tokens, device=str(bench.device))
            heads_first = [x.transpose(0, 1)[None].contiguous() for x in (p.q, p.k, p.v)]
            calls.append(partial(attend, *heads_first, block_mask=mask))
        return calls

    cut = first_rows(sets[0])
    return Contender("FlexAttention", result=lambda found: cut([found[0].transpose(0, 1)]), make=make)


def dense(bench: Bench, sets: list[Packed], backend: str, direction: str, dropout_p: float = 0.0) -> Contender:
    """torch's SDPA, where all lengths are one and nothing is padded."""

    def make() -> Calls:
        bench.need_cuda()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, SDPA_BACKENDS[backend])

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)

        calls: list[Callable[[], Any]] = []
        for p in sets:
            q, k, v, grad = (p.dense(x) for x in (p.q, p.k, p.v, p.grad))
            if direction == "forward":
                calls.append(partial(call, q, k, v))
                continue
            inputs = [x.requires_grad_() for x in (q, k, v)]
            if direction == "backward":
                with torch.enable_grad():
                    out = call(*inputs)
                calls.append(partial(torch.autograd.grad, out, inputs, grad, retain_graph=True))
            else:
                calls.append(partial(_both, call, inputs, grad))
        return calls

    p, cut = sets[0], first_rows(sets[0])

    def result(found: Any) -> Sequence[Tensor]:
        return cut([p.sparse(x) for x in ([found] if direction == "forward" else found)])

    name = f"dense SDPA {backend}" + (" with dropout" if dropout_p > 0 else "")
    return Contender(name, result=None if dropout_p > 0 else result, make=make)


@torch.enable_grad()
def _both(call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Any:
    return torch.autograd.grad(call(*inputs), inputs, grad)


def padded(bench: Bench, sets: list[Packed]) -> Contender:
    """torch's SDPA on the padded batch with a mask; whatever backend it picks."""

    def make() -> Calls:
        bench.need_cuda()
        calls = []
        for p in sets:
            q, k, v = (p.batch.pad(x).transpose(1, 2).contiguous() for x in (p.q, p.k, p.v))
            mask = right_padded(p.lengths).bool().to(bench.device)[:, None, None, :]
            calls.append(partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask))
        return calls

    p, cut = sets[0], first_rows(sets[0])
    return Contender("SDPA, padded", result=lambda found: cut([p.batch.select(found.transpose(1, 2))]), make=make)


# ---- the cases -------------------------------------------------------------------------------------------------------


def _lengths(bench: Bench, lengths: Tensor) -> Tensor:
    """In a dry run a few short sequences, all of one length where the real ones are."""
    if not bench.is_dry:
        return lengths
    return torch.tensor([20, 20]) if bool((lengths == lengths[0]).all()) else torch.tensor([5, 33])


def _describe(record: Record, p: Packed, factor: float) -> None:
    record.facts["tokens"] = p.batch.total_tokens
    if record.seconds is not None:
        record.facts["TFLOP/s"] = factor * p.flops / record.seconds / 1e12


@torch.no_grad()
def forward(bench: Bench, record: Record, *, heads: int, lengths: Tensor, goals: dict[str, float]) -> None:
    sets = input_sets(bench, _lengths(bench, lengths), bench.size(heads, 2))
    p, cut = sets[0], first_rows(sets[0])
    with torch.enable_grad():
        wanted, _ = expected(p)
    bench.verify(record, cut([_ours(p)]), wanted)
    record.floor = bench.floor(moved=4 * p.tensor_bytes, flops=p.flops)
    peers = [varlen(bench, sets), flash(bench, sets, "forward")]
    peers += [dense(bench, sets, backend, "forward") for backend in SDPA_BACKENDS] if p.is_full else []
    peers += [padded(bench, sets)] if p.batch.max_seqlen <= 128 else []
    peers += [flex(bench, sets)]
    bench.time(record, Contender("ours", [partial(_ours, p) for p in sets]), peers, expected=wanted)
    for name, bound in goals.items():
        record.expect_faster(name, bound)
    _describe(record, p, 1.0)


@torch.no_grad()
def backward(bench: Bench, record: Record, *, lengths: Tensor, goals: dict[str, float], runs: int = 100) -> None:
    sets = input_sets(bench, _lengths(bench, lengths), bench.size(12, 2))
    p, cut = sets[0], first_rows(sets[0])
    with torch.enable_grad():
        _, wanted = expected(p)
    calls = [partial(_our_backward, p, *_our_forward(p, None, 0.0), None, 0.0) for p in sets]
    first = calls[0]()
    bench.verify(record, cut(first), wanted)
    runs = bench.size(runs, 2)
    if runs:
        equal = sum(all(map(torch.equal, calls[0](), first)) for _ in range(runs))
        record.expect("runs equal bit for bit", runs, equal)
    record.floor = bench.floor(moved=8 * p.tensor_bytes, flops=2.5 * p.flops)
    peers = [flash(bench, sets, "backward")]
    peers += [dense(bench, sets, backend, "backward") for backend in ("flash", "cuDNN")] if p.is_full else []
    bench.time(record, Contender("ours", calls), peers, expected=wanted)
    for name, bound in goals.items():
        record.expect_faster(name, bound)
    _describe(record, p, 2.5)


@torch.no_grad()
def dropout(bench: Bench, record: Record, *, direction: str, has_goals: bool) -> None:
    sets = input_sets(bench, _lengths(bench, full(512, 32768)), bench.size(12, 2))
    p, cut = sets[0], first_rows(sets[0])
    seed = functional.draw_seed(bench.device)
    kept = kept_probabilities(p, seed)
    with torch.enable_grad():
        out, grads = expected(p, kept)
    found = [_our_forward(p, seed, DROPOUT)[0], *_our_both(p, seed, DROPOUT)]
    bench.verify(record, cut(found), [*out, *grads])
    record.facts["share dropped"] = 1.0 - float(kept.float().mean())

    def calls(rate: float) -> Calls:
        if direction == "forward":
            return [partial(_our_forward, p, seed, rate) for p in sets]
        if direction == "backward":
            return [partial(_our_backward, p, *_our_forward(p, seed, rate), seed, rate) for p in sets]
        return [partial(_our_both, p, seed, rate) for p in sets]

    peers = [Contender("bert_fast without dropout", calls(0.0)), flash(bench, sets, direction, DROPOUT)]
    peers += [dense(bench, sets, backend, direction, DROPOUT) for backend in ("cuDNN", "efficient")]
    bench.time(record, Contender("ours", calls(DROPOUT)), peers)
    if has_goals:
        own = record.peer("bert_fast without dropout")
        slowdown = None if own is None or not own.ratio else 1.0 / own.ratio
        record.expect("x its own time without dropout", 1.15, slowdown, is_upper=True)
        record.expect_faster("FA2 varlen with dropout", 1.15)
    _describe(record, p, {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction])


@torch.no_grad()
def both(bench: Bench, record: Record, *, lengths: Tensor) -> None:
    """Forward and backward."""
    sets = input_sets(bench, _lengths(bench, lengths), bench.size(12, 2))
    p, cut = sets[0], first_rows(sets[0])
    with torch.enable_grad():
        _, wanted = expected(p)
    calls = [partial(_our_both, p, None, 0.0) for p in sets]
    bench.verify(record, cut(calls[0]()), wanted)
    bench.time(record, Contender("ours", calls), [flash(bench, sets, "both")], expected=wanted)
    _describe(record, p, 3.5)

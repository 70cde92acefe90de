"""LayerNorm, GELU, embeddings and the vocabulary head, each with what is fused into it, against torch."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bert_fast import functional, masking, reference

from .measure import ERROR_BOUNDS, Bench, Calls, Contender, compiled, peak_memory, relative_error
from .report import Record

DROPOUT = 0.1
EPS = 1e-12
ROWS = 16384


def _contenders(
    bench: Bench,
    functions: dict[str, Callable[..., Tensor]],
    sets: list[tuple[list[Tensor], Tensor]],
    direction: str,
    **extras: Any,
) -> list[Contender]:
    """Functions of the same inputs, each forward as in training, backward, or both.

    The name "torch.compile" stands for a function that is compiled first. The inputs of a set are those that have a
    gradient; the last tensor of a set is the gradient of the result.
    """

    def make(name: str, function: Callable[..., Tensor]) -> Calls:
        if name == "torch.compile":
            function = compiled(bench, function)
        calls: list[Callable[[], Any]] = []
        for inputs, grad in sets:
            if direction == "forward":
                calls.append(partial(function, *inputs, **extras))
            elif direction == "backward":
                y = function(*inputs, **extras)
                calls.append(partial(torch.autograd.grad, y, inputs, grad, retain_graph=True))
            else:
                calls.append(partial(_both, function, inputs, grad, extras))
        return calls

    return [Contender(name, make=partial(make, name, function)) for name, function in functions.items()]


def _both(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, extras: dict[str, Any]) -> Any:
    return torch.autograd.grad(function(*inputs, **extras), inputs, grad)


def _verify(
    bench: Bench, record: Record, ours: Callable[..., Tensor], truth: Callable[..., Tensor],
    inputs: list[Tensor], grad: Tensor,
) -> None:  # fmt: skip
    """Result and gradients against the formula in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = truth(*exact)
    found = ours(*inputs)
    grads = torch.autograd.grad(found, inputs, grad)
    bench.verify(record, [found, *grads], [wanted, *torch.autograd.grad(wanted, exact, grad.double())])


# ---- bias + dropout + residual + LayerNorm ---------------------------------------------------------------------------


def _our_norm(x: Tensor, residual: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, *, seed: Tensor) -> Tensor:
    return functional.layer_norm(
        x, weight, bias, EPS, residual, input_bias=input_bias, dropout_p=DROPOUT, seed=seed
    )  # fmt: skip


def _torch_norm(
    x: Tensor, residual: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, *, seed: Tensor | None = None
) -> Tensor:
    del seed  # torch draws from its generator
    summed = F.dropout(x + input_bias, DROPOUT) + residual
    return F.layer_norm(summed, summed.shape[-1:], weight, bias, EPS)


def layer_norm(bench: Bench, record: Record, *, width: int, direction: str) -> None:
    rows, width = bench.size((ROWS, width), (6, 48))
    item = 2 * rows * width

    def inputs() -> tuple[list[Tensor], Tensor]:
        wide = [bench.randn(rows, width).requires_grad_() for _ in range(2)]
        thin = [bench.randn(width, scale=0.3).requires_grad_(), *_norm_weights(bench, width)]
        return [*wide, *thin], bench.randn(rows, width)

    sets = [inputs() for _ in range(bench.input_sets(3 * item))]
    seed = functional.draw_seed(bench.device)
    # In a row of ones what is dropped lies below -1 after the normalisation, and what is kept above 0.
    ones, zeros = torch.ones(width, device=bench.device), torch.zeros(width, device=bench.device)
    probe = torch.ones(rows, width, device=bench.device, dtype=bench.dtype)
    marks = functional.layer_norm(probe, ones.to(bench.dtype), zeros.to(bench.dtype), EPS, dropout_p=DROPOUT, seed=seed)
    kept = (marks > -0.5).double() / (1 - DROPOUT)

    def truth(x: Tensor, residual: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.layer_norm((x + input_bias) * kept, weight, bias, EPS, residual)

    _verify(bench, record, partial(_our_norm, seed=seed), truth, *sets[0])
    # Forward: x and residual in, y out. Backward: dy, x and residual in, dx and the residual's out.
    record.floor = bench.floor(moved=(3 if direction == "forward" else 5) * item)
    functions: dict[str, Callable[..., Tensor]] = {
        "ours": _our_norm,
        "eager": _torch_norm,
        "torch.compile": _torch_norm,
    }
    ours, *peers = _contenders(bench, functions, sets, direction, seed=seed)
    bench.time(record, ours, peers)
    record.expect_fraction(0.9 if direction == "forward" else 0.8)
    record.expect_faster("torch.compile", 1.0 if direction == "forward" else 1.2)


def _norm_weights(bench: Bench, width: int) -> list[Tensor]:
    return [(bench.randn(width, scale=0.2) + 1).requires_grad_(), bench.randn(width, scale=0.3).requires_grad_()]


# ---- bias + GELU -----------------------------------------------------------------------------------------------------


def gelu(bench: Bench, record: Record, *, approximate: str, direction: str) -> None:
    rows, width = bench.size((ROWS, 3072), (6, 48))
    item = 2 * rows * width

    def inputs() -> tuple[list[Tensor], Tensor]:
        return [bench.randn(*shape).requires_grad_() for shape in ((rows, width), (width,))], bench.randn(rows, width)

    sets = [inputs() for _ in range(bench.input_sets(2 * item))]

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return functional.gelu(x, bias, approximate)

    def in_torch(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate=approximate)

    _verify(bench, record, ours, partial(reference.gelu, approximate=approximate), *sets[0])
    record.floor = bench.floor(moved=(2 if direction == "forward" else 3) * item)
    functions = {"ours": ours, "eager": in_torch, "torch.compile": in_torch}
    first, *peers = _contenders(bench, functions, sets, direction)
    bench.time(record, first, peers)
    record.expect_fraction(0.9 if direction == "forward" else 0.85)


# ---- embeddings + LayerNorm + dropout --------------------------------------------------------------------------------


def embedding(bench: Bench, record: Record, *, direction: str) -> None:
    rows, width, words, places = bench.size((ROWS, 768, 30522, 512), (8, 48, 31, 16))
    tables = [bench.randn(entries, width).requires_grad_() for entries in (words, places, 2)]
    inputs = [*tables, *_norm_weights(bench, width)]
    indices = ids, positions, types = tuple(
        torch.randint(entries, (rows,), device=bench.device) for entries in (words, places, 2)
    )
    seed = functional.draw_seed(bench.device)

    def ours(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.embedding(
            word, position, token_type, ids, positions, types, weight, bias, EPS, dropout_p=DROPOUT, seed=seed
        )

    def in_torch(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parts = [F.embedding(idx, table) for idx, table in zip(indices, (word, position, token_type), strict=True)]
        return F.dropout(F.layer_norm(parts[0] + parts[2] + parts[1], (width,), weight, bias, EPS), DROPOUT)

    grad = bench.randn(rows, width)
    kept = (ours(*inputs).detach() != 0).double() / (1 - DROPOUT)

    def truth(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        looked_up = [table[idx] for idx, table in zip(indices, (word, position, token_type), strict=True)]
        return reference.layer_norm(sum(looked_up[1:], looked_up[0]), weight, bias, EPS) * kept

    _verify(bench, record, ours, truth, inputs, grad)
    if direction == "forward":  # the word table's rows in, y out; the other tables stay in the cache
        record.floor = bench.floor(moved=2 * 2 * rows * width)
    functions = {"ours": ours, "eager": in_torch, "torch.compile": in_torch}
    first, *peers = _contenders(bench, functions, [(inputs, grad)], direction)
    bench.time(record, first, peers)
    record.expect_faster("eager", 2.0)


# ---- the masked-language-model head ----------------------------------------------------------------------------------


def masked_lm_head(bench: Bench, record: Record) -> None:
    """Head and loss, forward and backward: theirs on all tokens, ours on the labelled ones."""
    import transformers

    bert: Any = importlib.import_module("transformers.models.bert.modeling_bert")
    rows, width, words = bench.size((ROWS, 768, 30522), (24, 48, 61))
    with bench.device:
        head = bert.BertOnlyMLMHead(transformers.BertConfig(hidden_size=width, vocab_size=words, num_attention_heads=1))
    head.to(bench.dtype)
    for parameter in head.parameters():
        parameter.data.copy_(bench.randn(*parameter.shape, scale=0.02))
    ids = torch.randint(5, words, (1, rows))
    masked = masking.mask_tokens(ids, special_ids=[0], mask_id=4, vocab_size=words, seed=1)
    labels = masked.labels.flatten()
    labelled = (labels >= 0).nonzero().flatten().to(bench.device)
    labels = labels.to(bench.device)
    targets = labels[labelled]
    hidden = bench.randn(rows, width).requires_grad_()
    transform, decoder = head.predictions.transform, head.predictions.decoder
    weights = [*transform.parameters(), *decoder.parameters()]
    inputs = [hidden, *weights]

    def theirs() -> Any:
        scores = head(hidden)
        loss = nn.functional.cross_entropy(scores.view(-1, words), labels)
        return loss, *torch.autograd.grad(loss, inputs)

    def ours() -> Any:
        x = F.linear(hidden.index_select(0, labelled), transform.dense.weight)
        x = functional.gelu(x, transform.dense.bias)
        x = functional.layer_norm(x, transform.LayerNorm.weight, transform.LayerNorm.bias, EPS)
        loss = functional.linear_cross_entropy(x, decoder.weight, decoder.bias, targets)
        return loss, *torch.autograd.grad(loss, inputs)

    def theirs_on_labelled() -> Any:
        loss = nn.functional.cross_entropy(head(hidden.index_select(0, labelled)).float(), targets)
        return loss, *torch.autograd.grad(loss, inputs)

    memory = []
    for call in (ours, theirs):
        call()
        with peak_memory(bench) as found:
            call()
        memory += found
    exact = copy.deepcopy(head).float()
    exact_weights = [*exact.predictions.transform.parameters(), *exact.predictions.decoder.parameters()]
    exact_hidden = hidden.detach().float().requires_grad_()
    exact_loss = F.cross_entropy(exact(exact_hidden.index_select(0, labelled)), targets)
    wanted = [exact_loss.detach(), *torch.autograd.grad(exact_loss, [exact_hidden, *exact_weights])]
    theirs_error = relative_error(theirs(), wanted)
    bench.verify(record, ours(), wanted, max(2 * theirs_error, ERROR_BOUNDS[bench.dtype]))
    bench.time(
        record,
        Contender("ours", [ours]),
        [
            Contender("transformers, all tokens", [theirs]),
            Contender("transformers' head, labelled tokens", [theirs_on_labelled]),
        ],
    )
    record.facts |= {"labelled": labelled.numel(), "tokens": rows, "theirs' error": theirs_error}
    record.expect_faster("transformers, all tokens", 3.0)
    unless = None if memory else "needs a CUDA device"
    record.expect("of its extra memory", 0.1, memory[0] / memory[1] if memory else None, is_upper=True, unless=unless)
    record.expect("waits for the device", 0, _waits(bench, ours), is_upper=True, unless=unless)


def _waits(bench: Bench, call: Callable[[], Any]) -> float | None:
    """1 where the call synchronises with the device, which torch then refuses; else 0."""
    if not bench.is_cuda:
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return 1.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0

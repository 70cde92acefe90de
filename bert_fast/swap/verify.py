"""verify: is the swapped model the same model? Its errors beside the original's, both against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Products
from .core import argument_names, bind, original, rounding_of, swapped_encoders, without_rounding

# An error may be twice the original's, and this many units in the last place of the largest value where both are tiny.
FACTOR = 2.0
UNITS = 16.0

FEWEST_TEXTS_TO_RANK = 4

# Outputs (batch, length) with a number for each token, of all models or of one; other outputs of two dimensions belong
# to the sequences.
TOKEN_SCORES = ("start_logits", "end_logits", "ElectraForPreTraining.logits")


@dataclass(frozen=True)
class Bounds:
    """What products in fewer bits may cost: see RoundingCheck."""

    cosine: float
    distance: float
    rank_correlation: float


BOUNDS: Mapping[Products, Bounds] = {"int8": Bounds(0.98, 0.25, 0.95), "bfloat16": Bounds(0.999, 0.05, 0.99)}


class VerificationError(ArithmeticError):
    """The swapped model's error is out of bounds; `result` has the figures."""

    def __init__(self, result: Verification) -> None:
        super().__init__(f"the swapped model is out of bounds\n{result}")
        self.result = result


@dataclass(frozen=True)
class TensorCheck:
    """One tensor, compared where the mask has tokens.

    Attributes:
        name: where it comes from.
        error: max abs difference of the swapped model's value from float64's.
        original_error: the same for the unswapped model.
        difference: max abs difference between the two.
        bound: what `error` may be.
        cosine: smallest cosine between a row of the two.
    """

    name: str
    error: float
    original_error: float
    difference: float
    bound: float
    cosine: float

    @property
    def is_within(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass(frozen=True)
class RoundingCheck:
    """An encoder that was asked to multiply in fewer bits than its parameters have, by its texts' vectors: the means of
    the last hidden states at the tokens.

    Attributes:
        name: of the encoder.
        products: what it was asked for.
        cosine: smallest cosine between a text's vector and the same from float64.
        distance: largest distance between the two, by the length of the true one.
        rank_correlation: Spearman's, between the cosines of all pairs of texts and the same from float64; None where
            there are too few texts.
    """

    name: str
    products: Products
    cosine: float
    distance: float
    rank_correlation: float | None

    @property
    def is_within(self) -> bool:
        bounds = BOUNDS[self.products]
        rank_correlation = 1.0 if self.rank_correlation is None else self.rank_correlation
        return (  # false for NaN
            self.cosine >= bounds.cosine
            and self.distance <= bounds.distance
            and rank_correlation >= bounds.rank_correlation
        )

    def __str__(self) -> str:
        bounds = BOUNDS[self.products]
        ranks = "too few texts to rank" if self.rank_correlation is None else f"{self.rank_correlation:.4f}"
        mark = "" if self.is_within else "  out of bounds"
        return (
            f"{self.name} in {self.products}: smallest cosine of a text {self.cosine:.5f} (bound {bounds.cosine}), "
            f"largest distance {self.distance:.4f} (bound {bounds.distance}), rank correlation of pairs {ranks} "
            f"(bound {bounds.rank_correlation}){mark}"
        )


@dataclass(frozen=True)
class Verification:
    """The figures of one call of verify; `checks` are of the model without what swap's int8 or bf16 rounds."""

    checks: tuple[TensorCheck, ...]
    rounding_checks: tuple[RoundingCheck, ...] = ()

    @property
    def is_within(self) -> bool:
        return all(check.is_within for check in self.checks) and all(check.is_within for check in self.rounding_checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{'tensor':<{width}}  {'error':>9}  {'original':>9}  {'bound':>9}  {'difference':>10}  {'cosine':>9}"]
        for c in self.checks:
            mark = "" if c.is_within else "  out of bounds"
            lines.append(
                f"{c.name:<{width}}  {c.error:9.2e}  {c.original_error:9.2e}  {c.bound:9.2e}  {c.difference:10.2e}"
                f"  {c.cosine:9.7f}{mark}"
            )
        return "\n".join([*lines, *map(str, self.rounding_checks)])


def _floats(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor in a model's output, with a name."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _floats(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _floats(item, f"{name}[{index}]" if name else str(index))


def _check(
    name: str, ours: Tensor, theirs: Tensor, exact: Tensor, mask: Tensor | None, model: nn.Module
) -> TensorCheck:
    # A loss in float32 has no more digits than the model that it comes from.
    eps = max(torch.finfo(x.dtype).eps for x in (ours, next(model.parameters())))
    values = [x.detach().to("cpu", torch.float64) for x in (ours, theirs, exact)]
    is_for_tokens = values[0].dim() > 2 or not {name, f"{type(model).__name__}.{name}"}.isdisjoint(TOKEN_SCORES)
    if mask is not None and values[0].shape[:2] == mask.shape and is_for_tokens:
        values = [x[mask] for x in values]
    elif mask is not None and values[0].dim() > 0 and values[0].shape[0] == mask.shape[0]:
        # Kernels differ in what attention gives to a sequence without tokens: it is left out.
        values = [x[mask.any(1)] for x in values]
    a, b, c = values
    if a.numel() == 0:
        return TensorCheck(name, 0.0, 0.0, 0.0, 0.0, 1.0)
    original_error = (b - c).abs().max().item()
    bound = FACTOR * original_error + UNITS * eps * c.abs().max().item()
    rows_a, rows_b = (x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (a, b))
    cosine = torch.nn.functional.cosine_similarity(rows_a, rows_b, dim=-1, eps=1e-30)
    cosine = torch.where((rows_a == rows_b).all(-1), 1.0, cosine)
    return TensorCheck(
        name, (a - c).abs().max().item(), original_error, (a - b).abs().max().item(), bound, cosine.min().item()
    )


def _text_vectors(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """(texts, hidden_size): the mean over the tokens of each text that has any."""
    hidden = hidden.detach().to("cpu", torch.float64)
    if rows is None:
        return hidden.mean(1)
    has_tokens = rows.any(1)
    rows = rows[has_tokens]
    return (hidden[has_tokens] * rows[..., None]).sum(1) / rows.sum(1, keepdim=True)


def _rounding_check(name: str, products: Products, state: Tensor, oracle: Tensor, rows: Tensor | None) -> RoundingCheck:
    ours, exact = _text_vectors(state, rows), _text_vectors(oracle, rows)
    if len(ours) == 0:
        return RoundingCheck(name, products, 1.0, 0.0, None)
    cosine = torch.nn.functional.cosine_similarity(ours, exact, dim=-1).min().item()
    distance = ((ours - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
    if len(ours) < FEWEST_TEXTS_TO_RANK:
        return RoundingCheck(name, products, cosine, distance, None)
    one, other = torch.triu_indices(len(ours), len(ours), 1)
    ranks = []
    for vectors in (ours, exact):
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        ranks.append((unit[one] * unit[other]).sum(-1).argsort().argsort().double())
    return RoundingCheck(name, products, cosine, distance, torch.corrcoef(torch.stack(ranks))[0, 1].item())


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """A SentenceTransformer takes its features as one dictionary, other models as keyword arguments."""
    if type(model).__module__.startswith("sentence_transformers."):
        return model(dict(batch))
    return model(**batch)


def _run(model: nn.Module, batch: Mapping[str, Any], encoders: Mapping[str, nn.Module]) -> tuple[Any, dict[str, Any]]:
    """The model's output; for each encoder that ran, its arguments by name and its output."""
    seen: dict[str, Any] = {}
    for name, module in encoders.items():

        def record(*args: Any, name: str = name, module: nn.Module = module, **kwargs: Any) -> Any:
            output = type(module).forward(module, *args, **kwargs)
            seen[name] = (bind(argument_names(type(module).forward), args, kwargs), output)
            return output

        # Not a hook: sentence-transformers calls forward itself, past all hooks.
        module.__dict__["forward"] = record
    try:
        return _call(model, batch), seen
    finally:
        for module in encoders.values():
            del module.__dict__["forward"]


def _run_exact(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The output of a float64 copy of the model, on the CPU."""
    inputs = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            value = value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
        inputs[name] = value
    return _call(copy.deepcopy(model).to("cpu", torch.float64), inputs)


def verify(model: nn.Module, batch: Any) -> Verification:
    """Runs one batch through the swapped model, the original and float64, in evaluation mode.

    Args:
        model: swapped.
        batch: the keyword arguments of its forward (a dict or BatchEncoding); for a SentenceTransformer its features,
            or a list of texts.

    Returns:
        The errors of every floating tensor in the output and of each encoder's last hidden state, at the tokens,
        without int8 or bf16 of `swap`; and for an encoder that was swapped with one of those how far its texts' vectors
        are from the true ones.

    Raises:
        ValueError: nothing is swapped.
        VerificationError: an error is above twice the original's plus 16 units in the last place; or int8 or bf16 turn
            or move a text's vector, or reorder the pairs of texts, beyond BOUNDS.
    """
    encoders = dict(swapped_encoders(model))
    if not encoders:
        raise ValueError(f"{type(model).__name__} is not swapped; there is nothing to compare")
    if isinstance(batch, (list, tuple)):
        device = next(model.parameters()).device
        batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in model.tokenize(batch).items()}  # type: ignore[operator]
    mask = batch.get("attention_mask")
    tokens = mask.detach().cpu() != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
    with _evaluation(model):
        has_rounding = any(rounding_of(encoder) is not None for encoder in encoders.values())
        rounded_states = _run(model, batch, encoders)[1] if has_rounding else {}
        with without_rounding(model):
            # Some heads go another way where somebody watches the encoder.
            ours, (_, our_states) = _call(model, batch), _run(model, batch, encoders)
        with original(model):
            theirs, their_states = _run(model, batch, encoders)
            exact = _run_exact(model, batch)
        checks, rounding_checks = [], []
        for name, module in encoders.items():
            if name not in our_states:
                continue
            family = type(module).bert_fast_family  # type: ignore[attr-defined]
            call = our_states[name][0]
            (state, rows), (their_state, _) = (family.view(module, *x[name]) for x in (our_states, their_states))
            oracle = family.oracle(module, call)
            checks.append(_check(f"{name or 'encoder'}: last hidden state", state, their_state, oracle, rows, module))
            if (rounding := rounding_of(module)) is not None:
                state = family.view(module, *rounded_states[name])[0]
                rounding_checks.append(_rounding_check(name or "encoder", rounding.products, state, oracle, rows))
    if isinstance(ours, Tensor) and "" in encoders:
        ours = theirs = exact = None  # it is the encoder's last hidden state
    for (name, a), (_, b), (_, c) in zip(_floats(ours, ""), _floats(theirs, ""), _floats(exact, ""), strict=True):
        checks.append(_check(name or "output", a, b, c, tokens, model))
    result = Verification(tuple(checks), tuple(rounding_checks))
    if not result.is_within:
        raise VerificationError(result)
    return result

"""The parity table: every class that is known, swapped and as it was, both against float64; answers and gradients."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from . import core
from .family import Family
from .samples import SIZES, Batch, Sample, samples
from .verify import FACTOR, UNITS

DTYPES = (torch.float32, torch.bfloat16)
NAMES = FLOAT32, _ = ("float32", "bfloat16")

EVAL, TRAIN = MODES = ("eval", "train")

# What float32 is held to beside the bound.
FORWARD_ERROR = 1e-5
GRADIENT_RATIO = 2.0

COMMAND = "bert-fast verify --all --markdown docs/parity.md"

INTRODUCTION = """# Parity

The swapped model beside the same model as it was, both against a copy in float64. Written by
`{command}`, which ends with status 1 where a figure is out of bounds, or
where a model takes its original path for a reason that is not listed.

Every class is built with {layers} layers of width {width}, random weights and no dropout, and gets a ragged batch with
labels; what hidden places hold is random. *eval* is what the model returns, at the tokens, without gradients;
*train* is its loss and all its gradients, these relative to the largest of them. An encoder alone has no loss, and
gets a weighted sum of squares of its output. An error is the largest absolute difference from float64, relative to
the largest value, and that of the worst result is shown. It may be {factor:.0f} times the original's in the same dtype
and {units:.0f} units in the last place of the largest value. In bfloat16 a ReLU whose input is near to 0 can be flipped
by rounding, in either model by chance, and then makes most of a gradient's error.

bert-fast {bert-fast}, torch {torch}, transformers {transformers} with SDPA, on {device}, {instruction_set} kernels.

In float32 every output is within {limit:.0e} of float64, relative to its largest value, and the gradients' error is at
most {ratio:.0f} times torch's, {families}:"""


@dataclass(frozen=True)
class Figures:
    """Of one result, relative to the largest value that it has in float64.

    Attributes:
        name: of the output, or "loss", or "gradients": all of them.
        error: max abs difference of the swapped model's from float64's.
        original_error: the same for the unswapped model.
        bound: what `error` may be: see verify.
    """

    name: str
    error: float
    original_error: float
    bound: float

    @property
    def is_within(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        family: its name.
        model: see Sample.
        dtype: of the parameters.
        mode: "eval": what the model returns, without gradients; "train": its loss and gradients.
        reason: why the call took the original path; None: it took the fast one.
        listed: why it was to be expected to; None: it was not.
        figures: of every result.
    """

    family: str
    model: str
    dtype: str
    mode: str
    reason: str | None
    listed: str | None
    figures: tuple[Figures, ...]

    @property
    def error(self) -> float:
        return _largest(x.error for x in self.figures)

    @property
    def original_error(self) -> float:
        return _largest(x.original_error for x in self.figures)

    @property
    def ratio(self) -> float:
        return _ratio(self.error, self.original_error)

    @property
    def is_within(self) -> bool:
        return all(x.is_within for x in self.figures)

    @property
    def is_explained(self) -> bool:
        """Whether it took the fast path, or another for the reason that is listed."""
        return self.reason is None or self.reason == self.listed

    def of(self, name: str) -> Figures:
        return next(x for x in self.figures if x.name == name)


@dataclass(frozen=True)
class Parity:
    rows: tuple[Row, ...]
    device: str = "cpu"

    @property
    def is_right(self) -> bool:
        return bool(self.rows) and all(row.is_within and row.is_explained for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """null stands for what is no number, or has no bounds."""
        properties = ("error", "original_error", "ratio", "is_within", "is_explained")
        rows = [asdict(row) | {name: getattr(row, name) for name in properties} for row in self.rows]
        found = {**facts(self.device), "factor": FACTOR, "units": UNITS, "is_right": self.is_right, "rows": rows}
        result: dict[str, Any] = _finite(found)
        return result


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(device: str) -> dict[str, str]:
    """What the figures depend on."""
    names = ("bert-fast", "torch", "transformers")
    return {**{name: version(name) for name in names}, "instruction_set": _C.instruction_set(), "device": device}


def _largest(values: Iterable[float]) -> float:
    """NaN where one is."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def _ratio(error: float, original_error: float) -> float:
    if original_error == 0.0:
        return 1.0 if error == 0.0 else math.inf
    return error / original_error


# ---- measuring -------------------------------------------------------------------------------------------------------


def _results(output: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The floating tensors of an output by name; those that have a place for each token, at the tokens alone."""
    named = {"output": output} if isinstance(output, Tensor) else dict(output.items())
    return {
        name: x[tokens.to(x.device)] if x.shape[:2] == tokens.shape else x
        for name, x in named.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def _loss(output: Any, tokens: Tensor) -> Tensor:
    """The model's own; an encoder has none, and gets one that every number of its output matters to."""
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is not None:
        return loss
    generator = torch.Generator().manual_seed(3)
    terms = []
    for x in _results(output, tokens).values():
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        terms.append((x.double() * weights).square().mean())
    return torch.stack(terms).sum()


def _gradients(model: nn.Module) -> Tensor:
    """All in one; a parameter without a gradient has zeros."""
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in model.parameters()]
    return torch.cat([x.flatten() for x in gradients])


def _measure(model: nn.Module, batch: Batch, tokens: Tensor, mode: str) -> dict[str, Tensor]:
    """By name, on the CPU."""
    model.train(mode == TRAIN)
    if mode == EVAL:
        with torch.no_grad():
            results = _results(model(**batch), tokens)
    else:
        model.zero_grad()
        loss = _loss(model(**batch), tokens)
        loss.backward()
        results = {"loss": loss, "gradients": _gradients(model)}
    return {name: x.detach().cpu() for name, x in results.items()}


def _figures(name: str, ours: Tensor | None, theirs: Tensor, exact: Tensor, eps: float) -> Figures:
    largest = exact.abs().max().item() or 1.0
    original_error = (theirs.double() - exact).abs().max().item() / largest
    bound = FACTOR * original_error + UNITS * eps
    is_alike = ours is not None and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = (ours.double() - exact).abs().max().item() / largest if ours is not None and is_alike else math.inf
    return Figures(name, error, original_error, bound)


def _cast(batch: Batch, dtype: torch.dtype, device: torch.device | str) -> Batch:
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in batch.items()}


def _reason(model: nn.Module) -> str | None:
    """Why a call has taken the original path; None: all were fast. Forgets the calls."""
    paths: set[str] = set()
    for _, encoder in core.swapped_encoders(model):
        paths |= set(encoder.__dict__.pop("bert_fast_calls", {}))
    if not paths:
        return "no known encoder was called"
    return "; ".join(sorted(paths - {core.FAST})) or None


def rows_of(sample: Sample, device: torch.device | str = "cpu") -> Iterator[Row]:
    """One for each dtype and mode."""
    model = sample.make()
    batch, tokens = sample.batch(model)
    for name, dtype in zip(NAMES, DTYPES, strict=True):
        original, inputs = copy.deepcopy(model).to(device, dtype), _cast(batch, dtype, device)
        exact, exact_inputs = copy.deepcopy(original).to("cpu", torch.float64), _cast(inputs, torch.float64, "cpu")
        swapped = copy.deepcopy(original)
        with contextlib.suppress(ValueError):  # nothing known in it: the row says so
            core.swap(swapped)
        for mode in MODES:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "bert_fast: .* takes its original path", UserWarning)  # a row says it
                warnings.filterwarnings("ignore", "The PyTorch API of nested tensors", UserWarning)
                theirs = _measure(original, inputs, tokens, mode)
                truth = _measure(exact, exact_inputs, tokens, mode)
                ours = _measure(swapped, inputs, tokens, mode)
            # Not of a result's own dtype: a loss in float32 has no more digits than the model.
            eps = torch.finfo(dtype).eps
            yield Row(
                family=sample.family.name,
                model=sample.name,
                dtype=name,
                mode=mode,
                reason=_reason(swapped),
                listed=sample.listed,
                figures=tuple(_figures(key, ours.get(key), x, truth[key], eps) for key, x in theirs.items()),
            )


def rows(families: Sequence[Family] | None = None, device: torch.device | str = "cpu") -> Iterator[Row]:
    """The table, line by line; families: None means all."""
    for family in core.FAMILIES if families is None else families:
        for sample in samples(family):
            yield from rows_of(sample, device)


# ---- showing ---------------------------------------------------------------------------------------------------------

HEADER = ("model", "dtype", *(f"{mode} {name}" for mode in MODES for name in ("error", "theirs", "ratio")), "path")
NUMBERS = range(2, 8)  # columns


@dataclass(frozen=True)
class Line:
    """The rows of one model and dtype, as text in the columns of HEADER."""

    cells: tuple[str, ...]
    is_right: bool


def lines(rows: Iterable[Row]) -> dict[str, list[Line]]:
    """By family."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.family, row.model, row.dtype), []).append(row)
    result: dict[str, list[Line]] = {}
    for (family, model, dtype), group in groups.items():
        cells = [model, dtype]
        for row in group:
            cells += [f"{row.error:.1e}", f"{row.original_error:.1e}", f"{row.ratio:.2f}"]
        is_right = all(row.is_within and row.is_explained for row in group)
        result.setdefault(family, []).append(Line((*cells, _path(group)), is_right))
    return result


def _path(group: Sequence[Row]) -> str:
    paths = {row.reason and f"original: {row.reason}" for row in group}
    words = [path or core.FAST for path in sorted(paths, key=str)]
    words += [f"{row.mode} out of bounds" for row in group if not row.is_within]
    if not all(row.is_explained for row in group):
        words.append("not listed")
    return "; ".join(words)


def table(header: Sequence[str], body: Iterable[Sequence[str]], numbers: range = range(0)) -> str:
    """In Markdown; columns of numbers are aligned right."""
    rules = ["---:" if column in numbers else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *body))


@dataclass(frozen=True)
class Summary:
    """Of the rows of one family that took the fast path.

    Attributes:
        forward_error: the largest of float32, in evaluation.
        gradient_ratios: the largest error of the gradients over the original's, by dtype.
    """

    forward_error: float
    gradient_ratios: Mapping[str, float]

    @property
    def holds(self) -> bool:
        return self.forward_error <= FORWARD_ERROR and self.gradient_ratios[FLOAT32] <= GRADIENT_RATIO


def summary(rows: Iterable[Row]) -> Summary:
    """Of one family."""
    fast = [row for row in rows if row.reason is None]
    ratios = {}
    for dtype in NAMES:
        gradients = [row.of("gradients") for row in fast if row.mode == TRAIN and row.dtype == dtype]
        ratios[dtype] = _largest(_ratio(x.error, x.original_error) for x in gradients)
    return Summary(_largest(row.error for row in fast if row.mode == EVAL and row.dtype == FLOAT32), ratios)


def _introduction(summaries: Mapping[str, Summary], device: str) -> str:
    exceptions = ", ".join(family for family, each in summaries.items() if not each.holds)
    words = {
        **facts(device),
        "command": COMMAND,
        "layers": SIZES["num_hidden_layers"],
        "width": SIZES["hidden_size"],
        "factor": FACTOR,
        "units": UNITS,
        "limit": FORWARD_ERROR,
        "ratio": GRADIENT_RATIO,
        "families": f"**but for {exceptions}**" if exceptions else "in every family",
    }
    return INTRODUCTION.format_map(words)


def markdown(parity: Parity) -> str:
    """docs/parity.md."""
    families = dict.fromkeys(row.family for row in parity.rows)
    summaries = {name: summary(row for row in parity.rows if row.family == name) for name in families}
    header = ("family", "largest forward error", *(f"gradients, {dtype}: largest ratio" for dtype in NAMES), "holds")
    body = []
    for name, each in summaries.items():
        ratios = (f"{each.gradient_ratios[dtype]:.2f}" for dtype in NAMES)
        body.append((name, f"{each.forward_error:.1e}", *ratios, "yes" if each.holds else "**no**"))
    parts = [_introduction(summaries, parity.device), table(header, body, range(1, 4))]
    for name, group in lines(parity.rows).items():
        cells = [line.cells if line.is_right else (*line.cells[:-1], f"**{line.cells[-1]}**") for line in group]
        parts += [f"## {name}", table(HEADER, cells, NUMBERS)]
    return "\n\n".join(parts) + "\n"

"""What swap serves, as the families' own code has it: README's table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import engine
from .core import FAMILIES, swap
from .family import Family
from .samples import Sample, is_of_transformers, model_classes, samples

BEGIN, END = "<!-- bert-fast info --markdown -->", "<!-- end -->"


class MarkersError(ValueError):
    """The file has no place for the table."""


@dataclass(frozen=True)
class Supported:
    """
    Attributes:
        name: of the family.
        encoder: its class.
        heads: rest of the names of the classes that hold it; what those read at hidden places is computed as before.
        features: what its layers and embeddings have.
        takes_any_mask: whether tokens may be anywhere; else each text's must be side by side.
        products: in which the CPU engine can multiply.
    """

    name: str
    encoder: str
    heads: tuple[str, ...]
    features: tuple[str, ...]
    takes_any_mask: bool
    products: tuple[str, ...]


def _features(plan: Any) -> Iterator[str]:
    """Of an encoder's plan."""
    embeddings = getattr(plan, "embeddings", None)
    if getattr(embeddings, "position", None) is not None:
        yield "learned positions"
    if getattr(plan, "relative_bias", None) is not None:
        yield "relative position bias"
    if getattr(plan, "rotary", None) is not None:
        yield "rotary positions"
    if any(layer.window is not None for layer in plan.layers):
        yield "attention windows"
    if any(layer.gate is not None for layer in plan.layers):
        yield "gated feed-forward"
    if getattr(plan, "projection", None) is not None:
        yield "narrow embeddings"


def _plan(sample: Sample) -> Any:
    """Of a call with the sample's batch: a string where it would take the original path."""
    model = sample.make()
    batch, _ = sample.batch(model)
    return sample.family.plan(model, batch)


def _products(family: Family, model: nn.Module) -> Iterator[str]:
    """In which the CPU engine takes the encoder's layers."""
    options: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"bf16": True}, "int8": {"int8": True}}
    for products, option in options.items():
        stack = family.stack(swap(model, **option))
        with torch.no_grad():
            if stack.wanted == products and engine.why_not(stack, next(model.parameters())) is None:
                yield products


def _norms(plans: list[Any]) -> Iterator[str]:
    orders = {plan.layers[0].norm_first for plan in plans}
    if True in orders:
        yield "norms first or last" if len(orders) == 2 else "norms first"


def supported(family: Family) -> Supported:
    """What is served of a family, by small models of it; needs transformers for its families."""
    encoders = [x for x in samples(family) if x.name.partition(",")[0] == family.encoder]
    found = [_plan(x) for x in encoders]
    plans = [plan for plan in found if not isinstance(plan, str)]
    features = dict.fromkeys(feature for plan in plans for feature in _features(plan))
    return Supported(
        name=family.name,
        encoder=family.encoder,
        heads=tuple(_heads(family)),
        features=(*features, *_norms(plans)),
        takes_any_mask=len(plans) == len(found),
        products=tuple(_products(family, encoders[0].make())),
    )


def _heads(family: Family) -> Iterator[str]:
    if is_of_transformers(family):
        prefix = family.encoder.removesuffix("Model")
        names = (cls.__name__ for cls in model_classes(family))
        yield from (name.removeprefix(prefix).removeprefix("For") for name in names if name in family.kept_rows)


def _listed(names: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), names[-1])))


NUMERALS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _the(heads: Set[str]) -> str:
    return f"the {NUMERALS[len(heads)] if len(heads) < len(NUMERALS) else len(heads)}"


def _rows(known: Sequence[Supported], heads: Set[str], products: Set[str]) -> Iterator[tuple[str, ...]]:
    """Families that differ in nothing but their names share a row; heads and products are those that all have."""
    groups: dict[tuple[Any, ...], list[Supported]] = {}
    for x in known:
        groups.setdefault((x.heads, x.features, x.takes_any_mask, x.products), []).append(x)
    for (own_heads, features, takes_any_mask, own_products), group in groups.items():
        names = [x.name for x in group if not x.name.startswith("torch.")] or ["torch.nn"]
        more = [head for head in own_heads if head not in heads]
        common = [_the(heads)] if own_heads and heads else []
        others = [f"on CPUs {name} too" for name in own_products if name not in products]
        yield (
            ", ".join(names),
            ", ".join(f"`{x.encoder}`" for x in group),
            ", ".join(common + more) or "none",
            ", ".join((*features, *others)) or "-",
            "any" if takes_any_mask else "a text's tokens side by side",
        )


def markdown() -> str:
    """README's section: what swap serves."""
    known = [supported(family) for family in FAMILIES]
    heads = set.intersection(*(set(x.heads) for x in known if x.heads))
    products = [name for name in known[0].products if all(name in x.products for x in known)]
    header = ("family", "encoder", "heads", "has", "masks")
    introduction = f"On CPUs every encoder multiplies in {_listed(products, 'or')}."
    if heads:
        names = _listed([f"`…For{head}`" for head in sorted(heads)])
        introduction = f"All of transformers' families have {_the(heads)} heads {names}. {introduction}"
    lines = [
        *textwrap.wrap(introduction, 120, break_on_hyphens=False),
        "",
        *(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *_rows(known, heads, {*products}))),
    ]
    return "\n".join(lines)


def section_of(text: str) -> str:
    """What stands between the two markers.

    Raises:
        MarkersError: they are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise MarkersError(f"one line {BEGIN!r} and, below it, one line {END!r} are needed")
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def renew(file: Path) -> None:
    """Writes the table between the file's markers.

    Raises:
        MarkersError: see section_of.
    """
    text = file.read_text(encoding="utf-8")
    section_of(text)
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{after}", encoding="utf-8")

"""The calls that the encoder's benchmarks time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import bert_fast
from bert_fast.cli import models

Batch = dict[str, Tensor]
Linear = Callable[[Tensor], Tensor]


def plain(module: nn.Linear, rows: int) -> Linear:  # noqa: ARG001
    return partial(F.linear, weight=module.weight, bias=module.bias)


def prepacked(module: nn.Linear, rows: int) -> Linear:
    """The map with a weight that oneDNN has laid out for so many rows; float32 on a CPU, no gradients."""
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("this torch has no oneDNN")
    mkldnn: Any = torch.ops.mkldnn
    weight, bias = mkldnn._reorder_linear_weight(module.weight.detach(), rows), module.bias.detach()
    return lambda x: mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def floor(model: Any, tokens: list[int], make: Callable[[nn.Linear, int], Linear] = plain) -> Callable[[], None]:
    """The layers' matrix products on the real tokens of each batch, and nothing else.

    Args:
        model: has encoder.layer.
        tokens: of each batch.
        make: gives the call for a module and a number of rows.
    """
    modules = [m for layer in model.encoder.layer for m in layer.modules() if isinstance(m, nn.Linear)]
    like = modules[0].weight.detach()
    work: list[tuple[Linear, Tensor]] = []
    made: dict[int, list[tuple[Linear, Tensor]]] = {}
    for count in tokens:
        if count not in made:
            inputs = {width: like.new_empty(count, width).normal_() for width in {m.in_features for m in modules}}
            made[count] = [(make(module, count), inputs[module.in_features]) for module in modules]
        work += made[count]

    def run() -> None:
        for linear, x in work:
            linear(x)

    return run


def encode(model: Any, batches: Iterable[Batch]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            model(**batch)

    return run


def training_pair(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """transformers' classifier from the folder's encoder, and a swapped twin; in evaluation mode."""
    from transformers import AutoModelForSequenceClassification

    def load() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval().to(device)

    with models.quiet():
        original, twin = load(), load()
    twin.load_state_dict(original.state_dict())  # the head is random
    return original, bert_fast.swap(twin)


def training_step(model: Any, batch: Batch) -> Callable[[], Tensor]:
    """Forward and backward on one batch with two classes; gives the loss."""
    labels = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device) % 2

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss: Tensor = model(**batch, labels=labels).loss
        loss.backward()
        return loss

    return run

"""What a call of an encoder of transformers runs on: its parts, none of which anybody listens to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import engine
from .. import nn as fast
from ..masking import PackedBatch
from .parts import Layer, run_layers


class Embeddings(NamedTuple):
    """See nn.EmbeddingParts."""

    word: nn.Module
    position: nn.Module | None
    token_type: nn.Module | None
    norm: nn.Module
    dropout: nn.Module


class RelativeBias(NamedTuple):
    """A bias of attention's scores, one for each head and bucket of relative positions.

    Attributes:
        table: an embedding (buckets, heads).
        longest: tokens that a sequence is not expected to exceed.
        buckets: gives the bucket of each distance, key minus query.
    """

    table: nn.Module
    longest: int
    buckets: Callable[[int, torch.device], Tensor]

    def values(self, max_seqlen: int) -> Tensor:
        """(heads, 2 * reach + 1), as functional.attention takes it. Its size is the same for all that is expected."""
        reach = max(self.longest, max_seqlen) - 1
        weight: Any = self.table.weight
        values: Tensor = self.table(self.buckets(reach, weight.device))
        return values.T


class Rotary(NamedTuple):
    """Rotary positions.

    Attributes:
        module: gives cosines and sines (1, positions, head_size) for activations, positions and a kind of layer.
        kinds: of layers; a layer's `rotation` is its number here.
        used: those that the model has.
    """

    module: nn.Module
    kinds: tuple[str, ...]
    used: tuple[str, ...]

    def values(self, hidden: Tensor, batch: PackedBatch, has_positions: bool) -> fast.Rotations:
        """Those of a batch; unless it has positions of its own they are columns, of which there are few."""
        # Of texts in one row, the longest has the most columns.
        length = batch.max_seqlen if batch.shape[0] == 1 and len(batch.cu_seqlens) > 2 else batch.shape[1]
        columns = batch.positions if has_positions else torch.arange(length, device=hidden.device)
        tables = {}
        for kind in self.used:
            cosines, sines = self.module(hidden[None], columns[None], kind)
            # The two halves of the last dimension are the same.
            half = (x[0, :, : x.shape[-1] // 2] for x in (cosines, sines))
            tables[kind] = tuple(x if has_positions else x.index_select(0, batch.positions) for x in half)
        unused: Any = next(iter(tables.values()), None)
        return [tables.get(kind, unused) for kind in self.kinds]


class Plan(NamedTuple):
    """The parts of an encoder, none of which anybody listens to.

    Attributes:
        projection: between the embeddings and the first layer, if there is one.
        stack: the layers as the CPU engine sees them.
        relative_bias: of the scores of every layer, if there is one.
        rotary: positions of the layers, if they are rotary.
        final_norm: after the last layer, if there is one.
    """

    embeddings: Embeddings
    projection: nn.Module | None
    layers: list[Layer]
    stack: engine.Stack
    relative_bias: RelativeBias | None = None
    rotary: Rotary | None = None
    final_norm: nn.Module | None = None

    def extras(self, hidden: Tensor, batch: PackedBatch, has_positions: bool) -> dict[str, Any]:
        """What the layers take beside the embeddings `hidden` (tokens, hidden_size)."""
        extras: dict[str, Any] = {}
        if self.relative_bias is not None:
            extras["bias"] = self.relative_bias.values(batch.max_seqlen)
        if self.rotary is not None:
            extras["rotations"] = self.rotary.values(hidden, batch, has_positions)
        return extras

    def finish(self, hidden: Tensor) -> Tensor:
        """What follows on the last layer, row by row."""
        return hidden if self.final_norm is None else fast.normalise(self.final_norm, hidden)


def embed(parts: Plan, batch: PackedBatch, embeds: Tensor | None = None) -> Tensor:
    """(tokens, hidden_size), what the first layer reads."""
    hidden = fast.embed(parts.embeddings, batch, embeds)
    return hidden if parts.projection is None else parts.projection(hidden)


def encode(
    model: nn.Module,
    parts: Plan,
    batch: PackedBatch,
    embeds: Tensor | None = None,
    kept: list[Tensor] | None = None,
    has_positions: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """(tokens or rows, hidden_size); `kept` receives the embeddings and every layer's output."""
    hidden = embed(parts, batch, embeds)
    extras = parts.extras(hidden, batch, has_positions)
    return parts.finish(run_layers(model, parts.stack, parts.layers, hidden, batch, rows=rows, kept=kept, **extras))


def _modules(parts: Plan) -> Iterator[Any]:
    """The modules that the encoder calls or fuses, and what else its layers are made of."""
    yield parts.projection
    yield parts.final_norm
    yield None if parts.relative_bias is None else parts.relative_bias.table
    yield None if parts.rotary is None else parts.rotary.module
    for part in (parts.embeddings, *parts.layers):
        yield from part


def parameters_of(parts: Plan) -> Iterator[Tensor]:
    """Every tensor that the encoder's modules own."""
    for module in _modules(parts):
        if isinstance(module, nn.Module):
            for owner in module.modules():
                yield from (x for x in owner._parameters.values() if x is not None)
                yield from (x for x in owner._buffers.values() if x is not None)


def structure_of(parts: Plan) -> Iterator[Any]:
    """What the encoder's work is made of, but for the contents of tensors."""
    for item in _modules(parts):
        yield item
        if isinstance(item, nn.Module):
            yield item.training
            yield getattr(item, "eps", None)

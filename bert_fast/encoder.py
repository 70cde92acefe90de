"""BertModel: the bidirectional encoder of Devlin et al. (2018), assembled from bert_fast.nn, without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from . import checkpoint, engine
from .config import ACTIVATIONS, BertConfig
from .guard import Kept
from .masking import PackedBatch, unpad
from .nn import EncoderLayer, EncoderLayerParts, LayerNorm, embed, is_plain

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BertModel", "BertOutput"]


@dataclass(frozen=True, eq=False)
class BertOutput:
    """
    Attributes:
        packed: (tokens, hidden_size), the last hidden states without padding.
        batch: where the packed rows belong.
        pooled: (batch, hidden_size), tanh of a linear layer on the first token; None without a pooler.
        packed_hidden_states: embeddings and every layer's output, each (tokens, hidden_size); empty unless asked for.
        rows: (rows,) int64, the packed rows that `packed` has, where only some were asked for; None: all.
    """

    packed: Tensor
    batch: PackedBatch
    pooled: Tensor | None
    packed_hidden_states: tuple[Tensor, ...]
    rows: Tensor | None = None

    @property
    def last_hidden_state(self) -> Tensor:
        """(batch, length, hidden_size), zeros at the padding.

        Raises:
            ValueError: only some rows were asked for.
        """
        if self.rows is not None:
            raise ValueError(f"the last layer was computed on {len(self.rows)} rows of {self.batch.total_tokens} alone")
        return self.batch.pad(self.packed)

    @property
    def hidden_states(self) -> tuple[Tensor, ...]:
        """packed_hidden_states, each as (batch, length, hidden_size), zeros at the padding."""
        return tuple(self.batch.pad(x) for x in self.packed_hidden_states)


class BertEmbeddings(nn.Module):
    """Word, position and token-type embeddings, LayerNorm and dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch, inputs_embeds: Tensor | None = None) -> Tensor:
        """-> (tokens, hidden_size)."""
        return embed(self, batch, inputs_embeds)


def initialise(module: nn.Module, std: float) -> None:
    """BERT's initial weights: normal with this standard deviation, zero biases and padding embedding."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
            elif part.padding_idx is not None:
                nn.init.zeros_(part.weight[part.padding_idx])


_stacks: Kept[engine.Stack | None] = Kept()


class BertModel(nn.Module):
    """The encoder.

    Args:
        config: its sizes.
        has_pooler: whether it has the linear layer and tanh on the first token.
    """

    def __init__(self, config: BertConfig, *, has_pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(
            EncoderLayer(
                hidden_size=config.hidden_size,
                num_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                activation=ACTIVATIONS[config.hidden_act],
                attention_dropout=config.attention_probs_dropout_prob,
                hidden_dropout=config.hidden_dropout_prob,
                layer_norm_eps=config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if has_pooler else None
        with torch.no_grad():
            initialise(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        output_hidden_states: bool = False,
        needs_kept_rows_only: bool = False,
    ) -> BertOutput:
        """Encodes a batch.

        Args:
            input_ids: (batch, length) int64, or a PackedBatch, with which no other tensor is given.
            attention_mask: (batch, length), not zero at the tokens; None: everywhere. A mask on the CPU costs no wait.
            token_type_ids: (batch, length) int64; None: zeros.
            position_ids: (batch, length) int64; None: the column.
            keep: (batch, length) bool, tokens computed although the mask hides them from the others.
            output_hidden_states: whether packed_hidden_states is filled.
            needs_kept_rows_only: whether the last layer, after its attention, may leave out all rows but those of
                `keep` and, for the pooler, the sequences' first; `packed` then has the rows of `keep` alone.

        Raises:
            ValueError: shapes that do not belong together, or a sequence longer than the position table.
        """
        batch = self.pack(input_ids, attention_mask, token_type_ids, position_ids, keep=keep)
        is_partial = needs_kept_rows_only and len(self.layers) > 0 and batch.kept is not None
        if is_partial and output_hidden_states:
            raise ValueError("output_hidden_states and needs_kept_rows_only are both True; one excludes the other")
        if is_partial:
            return self._encode_kept_rows(batch)
        kept = self._encode(self.embeddings(batch), batch, None, output_hidden_states)
        hidden = kept[-1]
        pooled = None if self.pooler is None else self._pool(hidden.index_select(0, batch.first_rows))
        return BertOutput(hidden, batch, pooled, tuple(kept) if output_hidden_states else ())

    def _encode(
        self, hidden: Tensor, batch: PackedBatch, rows: Tensor | None = None, needs_all: bool = False
    ) -> list[Tensor]:
        """The embeddings, with needs_all the layers' outputs, and the last layer's, for some rows or all."""
        if not torch.compiler.is_compiling():
            stack = _stacks.get(self, self._stack)
            outputs = (
                None if stack is None else engine.encode(self, stack, hidden, batch, needs_all=needs_all, rows=rows)
            )
            if outputs is not None:
                return [hidden, *outputs]
        kept = [hidden]
        for number, layer in enumerate(self.layers, 1):
            kept.append(layer(kept[-1], batch, rows if number == len(self.layers) else None))
        return kept

    def _stack(self) -> engine.Stack | None:
        """The layers for the engine, unless somebody wants to be called with what they compute."""
        if not all(is_plain(layer, EncoderLayer) for layer in self.layers):
            return None
        return engine.stack(cast("list[EncoderLayerParts]", list(self.layers)))

    def _pool(self, first: Tensor) -> Tensor:
        assert self.pooler is not None
        return torch.tanh(self.pooler(first))

    def _encode_kept_rows(self, batch: PackedBatch) -> BertOutput:
        """All layers, but the last one, after its attention, on the rows that are read."""
        rows = batch.kept
        assert rows is not None
        hidden = self.embeddings(batch)
        if self.pooler is None:
            return BertOutput(self._encode(hidden, batch, rows)[-1], batch, None, (), rows)
        first = batch.first_rows
        # A first row that is kept as well is computed twice: there are few, and to find them would wait for the device.
        read = self._encode(hidden, batch, torch.cat([first, rows]))[-1]
        return BertOutput(read[len(first) :], batch, self._pool(read[: len(first)]), (), rows)

    def pack(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        *,
        keep: Tensor | None = None,
    ) -> PackedBatch:
        """The batch without padding, the first token of every sequence kept."""
        if isinstance(input_ids, PackedBatch):
            others = (attention_mask, token_type_ids, position_ids, keep)
            if any(x is not None for x in others):
                raise ValueError("attention_mask, token_type_ids, position_ids and keep belong to unpacked input_ids")
            if input_ids.ids is None:
                raise ValueError("the PackedBatch has no ids")
            return input_ids
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; (batch, length) is needed")
        limit = self.config.max_position_embeddings
        if position_ids is None and input_ids.shape[1] > limit:
            raise ValueError(f"input_ids has length {input_ids.shape[1]}; max_position_embeddings is {limit}")
        mask = torch.ones(input_ids.shape, dtype=torch.bool) if attention_mask is None else attention_mask
        batch = unpad(mask, ids=input_ids, token_types=token_type_ids, keep=keep, keep_first=True)
        if position_ids is not None:
            batch = replace(batch, positions=batch.select(position_ids.expand(input_ids.shape)))
        return batch

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """The model in a Hugging Face folder: config.json beside model.safetensors or pytorch_model.bin.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another architecture, or weights that are missing or of another shape.
        """
        config = BertConfig.from_pretrained(path)
        weights = checkpoint.load(path)
        model = cls(config, has_pooler=any(name.endswith("pooler.dense.weight") for name in weights))
        checkpoint.apply(model, weights)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json and model.safetensors, which transformers' BertModel loads."""
        checkpoint.save(self, self.config, "BertModel", path)

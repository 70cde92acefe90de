"""sentence-transformers' pooling on packed rows, without a look at the padded ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..masking import PackedBatch

MODES = frozenset({"cls", "max", "mean", "mean_sqrt_len_tokens"})

# Features that change what pooling makes of the tokens.
OTHER_FEATURES = ("cls_token_embeddings", "cu_seq_lens_q", "token_weights_sum")


class PackedRows(NamedTuple):
    """Where a padded tensor came from.

    Attributes:
        hidden: (tokens, hidden_size).
        batch: that padded it.
        mask: (batch, length), of the call; None: there was no padding.
        versions: of the padded tensor and of the mask.
    """

    hidden: Tensor
    batch: PackedBatch
    mask: Tensor | None
    versions: tuple[int, int]


_rows = WeakTensorKeyDictionary()


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


def remember(padded: Tensor, hidden: Tensor, batch: PackedBatch, mask: Tensor | None) -> None:
    """Notes for as long as `padded` lives that it is batch.pad(hidden)."""
    if batch.is_plain and not torch.compiler.is_compiling():
        _rows[padded] = PackedRows(hidden, batch, mask, (_version(padded), _version(mask)))


def _module() -> Any:
    """sentence-transformers' module, if it is there and looks as expected."""
    module = sys.modules.get("sentence_transformers.sentence_transformer.modules.pooling")
    return module if hasattr(getattr(module, "Pooling", None), "POOLING_MODES") else None


def is_pooling(cls: Any) -> bool:
    """Whether instances of the class are sentence-transformers' own Pooling."""
    module = _module()
    return module is not None and cls is module.Pooling


def readers(model: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """(module, class of the next) wherever a module's encoder is read by the module that comes next."""
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            children = list(parent.children())
            for module, reader in pairwise(children):
                for encoder in module.children():
                    yield encoder, type(reader)


def forward(self: Any, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Pooling's forward, on the packed rows where it is known what they are."""
    modes = (self.pooling_mode,) if isinstance(self.pooling_mode, str) else self.pooling_mode
    rows = _rows_of(features)
    if rows is None or not MODES.issuperset(modes) or (not self.include_prompt and "prompt_length" in features):
        base: Any = self.bert_fast_base
        result: dict[str, Any] = base.forward(self, features, **kwargs)
        return result
    features["sentence_embedding"] = torch.cat([_pooled(mode, rows) for mode in modes], dim=-1)
    return features


def _rows_of(features: dict[str, Any]) -> PackedRows | None:
    padded, mask = features.get("token_embeddings"), features.get("attention_mask")
    if not isinstance(padded, Tensor) or any(name in features for name in OTHER_FEATURES):
        return None
    rows: PackedRows | None = _rows.get(padded)
    if rows is None or rows.mask is not mask or (mask is not None and mask.is_floating_point()):
        return None
    return rows if rows.versions == (_version(padded), _version(mask)) else None


def _pooled(mode: str, rows: PackedRows) -> Tensor:
    """(texts, hidden_size); sums of 16-bit numbers are made in float32, as sentence-transformers makes them."""
    hidden, batch = rows.hidden, rows.batch
    starts = batch.cu_seqlens[:-1].long()
    if mode == "cls":
        return hidden.index_select(0, starts)
    numbers = torch.arange(batch.total_tokens, device=hidden.device)
    wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    pooled = nn.functional.embedding_bag(numbers, wide, starts, mode="max" if mode == "max" else "sum")
    if mode != "max":
        length = batch.num_keys[:, None].to(wide.dtype)
        pooled = pooled / (length if mode == "mean" else length.sqrt())
    return pooled.to(hidden.dtype)

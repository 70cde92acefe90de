"""The face of the C++ module: padding out and in, packing, and masked-language-model targets.

Boundaries are found once, on the host, where the mask is. A mask on a GPU is copied to the host, which waits for the
device; hand over a CPU mask where that matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _C
from .functional import pad as _pad
from .ops import TILE_SIZE, host_array, packing_arrays

__all__ = [
    "Bins",
    "MaskedTokens",
    "PackedBatch",
    "from_flattened",
    "make_tiles",
    "mask_tokens",
    "pack",
    "pad",
    "unpad",
]


@dataclass(eq=False)  # not frozen: that would double the time it takes to make one
class PackedBatch:
    """A batch without its padding: sequence after sequence, and what is needed to run attention and to pad again.

    Attributes:
        ids: (tokens,) int64, or None where the batch is made of embeddings.
        positions: (tokens,) integers, index into the position table.
        token_types: (tokens,) int64, or None: all zero.
        cu_seqlens: (batch + 1,) int32, first row of each sequence, then the number of tokens.
        max_seqlen: rows of the longest sequence; under torch.compile a bound of it, the padded length.
        indices: (tokens,) int64, place of each row in the padded batch, row * length + column; None: nothing is padded.
        tiles: (tiles, 4) int32, the work list of attention: sequence start, rows, keys, first row.
        num_keys: (batch,) int32, how many of a sequence's first rows the others attend to.
        shape: batch and length of the padded batch.
        kept: (kept,) int64, ascending, the rows that unpad's `keep` marks, such as those with a label; None without it.
        is_plain: whether it is known that every sequence has rows, all of which the others attend to.
    """

    ids: Tensor | None
    positions: Tensor
    token_types: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor | None
    tiles: Tensor
    num_keys: Tensor
    shape: tuple[int, int]
    kept: Tensor | None = None
    is_plain: bool = False

    @property
    def total_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def first_rows(self) -> Tensor:
        """(batch,) int64, the packed row of each sequence's column 0, or of its first token where that was not kept.

        Raises:
            ValueError: a sequence has no row at all; `unpad(..., keep_first=True)` keeps one. Not checked on a GPU.
        """
        starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        if starts.device.type == "cpu" and not torch.compiler.is_compiling() and bool((starts == ends).any()):
            sequence = int((starts == ends).nonzero()[0])
            raise ValueError(f"sequence {sequence} has no rows; unpad(..., keep_first=True) keeps its first token")
        if self.indices is None:
            return starts
        extra = starts + self.num_keys
        columns = self.indices[extra.clamp(max=self.total_tokens - 1)] % self.shape[1]
        return torch.where((extra < ends) & (columns == 0), extra, starts)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def flattened(self) -> dict[str, Any]:
        """The keyword arguments with which transformers' models take texts that stand side by side in one row.

        Returns:
            input_ids, token_type_ids, if there are any, and position_ids, (1, tokens); cu_seq_lens_q, cu_seq_lens_k,
            max_length_q and max_length_k.

        Raises:
            ValueError: the batch has no ids, or rows that nobody attends to, of which these arguments cannot speak.
        """
        if self.ids is None:
            raise ValueError("the PackedBatch has no ids")
        if not self.is_plain and bool((self.cu_seqlens.diff() != self.num_keys).any()):
            raise ValueError("the PackedBatch has rows that nobody attends to, kept by unpad's keep or keep_first")
        types = {} if self.token_types is None else {"token_type_ids": self.token_types[None]}
        return {
            "input_ids": self.ids[None],
            **types,
            "position_ids": self.positions[None].long(),
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
        }

    def select(self, x: Tensor) -> Tensor:
        """Rows (tokens, ...) of a padded tensor (batch, length, ...); differentiable."""
        if x.shape[:2] != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; its first two dimensions must be {self.shape}")
        rows = x.flatten(0, 1)
        return rows if self.indices is None else rows.index_select(0, self.indices.to(x.device))

    def pad(self, x: Tensor) -> Tensor:
        """(batch, length, ...) from rows (tokens, ...), zeros at the padding; differentiable."""
        return pad(x, self)


def unpad(
    attention_mask: Tensor,
    *,
    ids: Tensor | None = None,
    token_types: Tensor | None = None,
    keep: Tensor | None = None,
    keep_first: bool = False,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """Takes the padding out of a batch: left, right or in between.

    Args:
        attention_mask: (batch, length), any dtype; not zero where a token is attended to. A row may be all padding.
        ids, token_types: (batch, length) int64, taken along.
        keep: (batch, length) bool: tokens that are computed although the mask hides them from the others. They stand
            behind their sequence's keys.
        keep_first: the same for column 0 of every row.
        device: of the result; None: that of ids, or of the mask.

    Returns:
        The packed batch; positions are columns.

    Raises:
        ValueError: a mask that is not two-dimensional, or tensors of other shapes than it.
    """
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; (batch, length) is needed")
    rows, columns = attention_mask.shape
    shape = (rows, columns)
    if ids is not None or token_types is not None or keep is not None:
        for name, tensor in (("ids", ids), ("token_types", token_types), ("keep", keep)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} and attention_mask {shape}; they must agree")
    place = attention_mask.device if ids is None else ids.device
    if device is not None:
        place = torch.device(device)
    if torch.compiler.is_compiling():
        batch = _traced(attention_mask, keep, keep_first, shape)
    else:
        indices, positions, cu_seqlens, num_keys, tiles, max_seqlen, is_whole, is_plain, kept = packing_arrays(
            attention_mask, keep, keep_first
        )
        batch = PackedBatch(
            ids=None,
            positions=torch.from_numpy(positions),
            token_types=None,
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=max_seqlen,
            indices=None if is_whole else torch.from_numpy(indices),
            tiles=torch.from_numpy(tiles),
            num_keys=torch.from_numpy(num_keys),
            shape=shape,
            kept=None if kept is None else torch.from_numpy(kept),
            is_plain=is_plain,
        )
    if place.type != "cpu":
        batch = batch.to(place)
    if ids is None and token_types is None:
        return batch
    return replace(
        batch,
        ids=None if ids is None else batch.select(ids.to(place)),
        token_types=None if token_types is None else batch.select(token_types.to(place)),
    )


def from_flattened(
    cu_seqlens: Tensor,
    *,
    ids: Tensor | None = None,
    token_types: Tensor | None = None,
    positions: Tensor | None = None,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """The batch of sequences that already stand side by side, without padding.

    Args:
        cu_seqlens: (sequences + 1,) integers, ascending from 0 to the number of tokens. On a GPU it is waited for.
        ids, token_types: (tokens,) int64.
        positions: (tokens,) integers; None: each sequence's from 0 on.
        device: of the result; None: that of ids, or of cu_seqlens.

    Returns:
        The batch; its shape is (1, tokens).

    Raises:
        ValueError: bounds that do not ascend from 0, or other tensors of another length than they end with.
    """
    bounds = torch.from_numpy(_integers("cu_seqlens", cu_seqlens, torch.int32))
    tiles = make_tiles(bounds)
    lengths = bounds.diff()
    tokens = int(bounds[-1])
    for name, tensor in (("ids", ids), ("token_types", token_types), ("positions", positions)):
        if tensor is not None and tuple(tensor.shape) != (tokens,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; cu_seqlens ends with {tokens}")
    if positions is None:
        positions = torch.arange(tokens) - bounds[:-1].long().repeat_interleave(lengths)
    batch = PackedBatch(
        ids=ids,
        positions=positions,
        token_types=token_types,
        cu_seqlens=bounds,
        max_seqlen=int(lengths.max()) if len(lengths) > 0 else 0,
        indices=None,
        tiles=tiles,
        num_keys=lengths,
        shape=(1, tokens),
        is_plain=bool((lengths > 0).all()),
    )
    place = device if device is not None else (cu_seqlens if ids is None else ids).device
    return batch.to(place)


def _traced(mask: Tensor, keep: Tensor | None, keep_first: bool, shape: tuple[int, int]) -> PackedBatch:
    """The batch as torch.compile may see it: whatever only the data know is a tensor, or its bound."""
    indices, positions, cu_seqlens, num_keys, tiles, kept = torch.ops.bert_fast.unpad(mask, keep, keep_first)
    return PackedBatch(
        ids=None,
        positions=positions,
        token_types=None,
        cu_seqlens=cu_seqlens,
        max_seqlen=shape[1],
        indices=indices,
        tiles=tiles,
        num_keys=num_keys,
        shape=shape,
        kept=None if keep is None else kept,
    )


def pad(x: Tensor, batch: PackedBatch) -> Tensor:
    """Puts packed rows back into the padded batch; differentiable.

    Args:
        x: (tokens, ...), any dtype.
        batch: where the rows came from.

    Returns:
        (batch, length, ...), zeros at the padding.

    Raises:
        ValueError: x has another number of rows than the batch has tokens.
    """
    if x.dim() == 0 or x.shape[0] != batch.total_tokens:
        raise ValueError(f"x has shape {tuple(x.shape)}; the batch has {batch.total_tokens} tokens")
    if batch.indices is not None:
        x = _pad(x, batch.indices, math.prod(batch.shape))
    return x.view(*batch.shape, *x.shape[1:])


def make_tiles(cu_seqlens: Tensor, num_keys: Tensor | None = None) -> Tensor:
    """The work list of attention for sequences that are already packed.

    Args:
        cu_seqlens: (sequences + 1,) int32, ascending from 0.
        num_keys: (sequences,) int32; None: every row is a key.

    Returns:
        (tiles, 4) int32 on the CPU: sequence start, rows, keys, first row of the tile.

    Raises:
        ValueError: bounds that do not ascend from 0, or more keys than rows.
    """
    keys = None if num_keys is None else _integers("num_keys", num_keys, torch.int32)
    return torch.from_numpy(_C.tiles(_integers("cu_seqlens", cu_seqlens, torch.int32), keys, TILE_SIZE))


def _integers(name: str, x: Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """x on the host in an integer dtype, unless that would change a value."""
    if x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} has dtype {x.dtype}; integers are needed")
    host = x.detach().to("cpu", torch.int64)
    limits = torch.iinfo(dtype)
    if dtype != torch.int64 and host.numel() > 0:
        for value in (int(host.min()), int(host.max())):
            if not limits.min <= value <= limits.max:
                raise ValueError(f"{name} holds {value}; {dtype} is needed")
    return host_array(host.to(dtype))


class Bins(NamedTuple):
    """
    Attributes:
        order: (sequences,) int64, sequence numbers, bin after bin, ascending within a bin.
        offsets: (bins + 1,) int64; bin b holds order[offsets[b] : offsets[b + 1]].
    """

    order: Tensor
    offsets: Tensor


def pack(lengths: Tensor, capacity: int) -> Bins:
    """Distributes sequences over as few bins as best-fit decreasing finds (Johnson 1973).

    Args:
        lengths: (sequences,) integers in [1, capacity].
        capacity: tokens that a bin takes.

    Returns:
        The bins. The same lengths always give the same bins; of equal lengths the earlier goes first.

    Raises:
        ValueError: a length outside [1, capacity].
    """
    order, offsets = _C.pack(_integers("lengths", lengths, torch.int64), capacity)
    return Bins(torch.from_numpy(order), torch.from_numpy(offsets))


class MaskedTokens(NamedTuple):
    """
    Attributes:
        ids: (rows, columns) int64, with masks and random tokens in.
        labels: (rows, columns) int64, the original id where one is predicted, else -100.
        positions: (predicted,) int64, ascending places row * columns + column of the labels.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor


def mask_tokens(
    ids: Tensor,
    *,
    special_ids: list[int],
    mask_id: int,
    vocab_size: int,
    probability: float = 0.15,
    unit: str = "token",
    word_ids: Tensor | None = None,
    max_span: int = 3,
    mask_probability: float = 0.8,
    random_probability: float = 0.1,
    seed: int | None = None,
    first_row: int = 0,
) -> MaskedTokens:
    """Chooses the tokens that a masked language model predicts (Devlin et al. 2018, section 3.1).

    Of the chosen tokens, mask_probability become mask_id, random_probability a random id that is not special, the rest
    stay. Every draw is Philox by (seed, first_row + row, column): threads and batch splits change nothing.

    Args:
        ids: (rows, columns) int64 in [0, vocab_size).
        special_ids: ids that are never chosen and never drawn ([PAD], [CLS], [SEP], [MASK], ...).
        mask_id: id of [MASK].
        vocab_size: number of ids, below 2^31.
        probability: share of the other tokens that is chosen.
        unit: "token"; "word": all tokens of a word or none; "span": 1 to max_span words in a row, n of them with a
            probability proportional to 1 / n (Lan et al. 2020, section 4.1), up to the share of each row. In every unit
            each token draws its own replacement.
        word_ids: (rows, columns) int32: equal neighbours form a word, negative ones are never chosen; "word" needs it.
        max_span: words in the longest span, 1 to 1000.
        mask_probability, random_probability: shares of the chosen tokens.
        seed: in [0, 2^64); None: drawn from torch's generator.
        first_row: number of the first row in the data set, so that a part of a batch gets what the whole would give it.

    Raises:
        ValueError: an id out of range (named with its place), a share outside [0, 1], another unit.
    """
    if unit == "word" and word_ids is None:
        raise ValueError("word_ids is None; unit 'word' needs the word of each token")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    for name, value in (("seed", seed), ("first_row", first_row)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; it must lie in [0, 2^64)")
    host_ids = _integers("ids", ids, torch.int64)
    words = None if word_ids is None else _integers("word_ids", word_ids, torch.int32)
    masked_ids, labels, positions = _C.mask_tokens(
        host_ids, words, special_ids, unit, probability, mask_probability, random_probability, mask_id,
        vocab_size, max_span, seed, first_row, torch.get_num_threads(),
    )  # fmt: skip
    return MaskedTokens(torch.from_numpy(masked_ids), torch.from_numpy(labels), torch.from_numpy(positions))

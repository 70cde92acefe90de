"""Host work: taking padding out, putting it back, choosing masked tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast import masking
from bert_fast.ops import TILE_SIZE

from .compare import compare
from .workloads import SEED, right_padded

ROWS, COLUMNS = 256, 512
VOCAB_SIZE, MASK_ID, SPECIAL_IDS = 30522, 103, [0, 100, 101, 102, 103]


def ragged_mask() -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return right_padded(torch.randint(16, COLUMNS + 1, (ROWS,), generator=generator), COLUMNS)


def torch_boundaries(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """indices, seqlens, cu_seqlens and max_seqlen, as padding-free code in torch finds them."""
    seqlens = mask.sum(-1, dtype=torch.int32)
    indices = torch.nonzero(mask.flatten()).flatten()
    return indices, seqlens, F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0)), int(seqlens.max())


def torch_metadata(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor]:
    """Everything that masking.unpad gives: the boundaries, positions, and attention's tile list."""
    indices, seqlens, cu_seqlens, max_seqlen = torch_boundaries(mask)
    tiles_of = -(-seqlens // TILE_SIZE)
    sequence = torch.repeat_interleave(tiles_of)
    first_tile = (tiles_of.cumsum(0) - tiles_of)[sequence]
    first_row = (torch.arange(len(sequence)) - first_tile) * TILE_SIZE
    lengths = seqlens[sequence]
    tiles = torch.stack([cu_seqlens[sequence], lengths, lengths, first_row.int()], 1)
    return indices, indices % mask.shape[1], seqlens, cu_seqlens, max_seqlen, tiles


@pytest.mark.parametrize("peer", ["the same outputs", "no positions, no tiles"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=["int64", "bool"])
def test_unpad(benchmark: Any, dtype: torch.dtype, peer: str) -> None:
    mask = ragged_mask().to(dtype)
    batch = masking.unpad(mask)
    indices, positions, seqlens, cu_seqlens, max_seqlen, tiles = torch_metadata(mask)
    assert batch.indices is not None
    assert torch.equal(batch.indices, indices)
    assert torch.equal(batch.positions, positions.int())
    assert torch.equal(batch.num_keys, seqlens)
    assert torch.equal(batch.cu_seqlens, cu_seqlens)
    assert torch.equal(batch.tiles, tiles)
    assert batch.max_seqlen == max_seqlen
    metadata = torch_metadata if peer == "the same outputs" else torch_boundaries
    compare(benchmark, lambda: masking.unpad(mask), {"torch": lambda: metadata(mask)}, rounds=500, warmup=50)


def test_pad(benchmark: Any) -> None:
    mask = ragged_mask()
    batch = masking.unpad(mask)
    assert batch.indices is not None
    rows = torch.randn(batch.total_tokens, 384)
    indices = batch.indices

    def in_torch() -> Tensor:
        return rows.new_zeros(ROWS * COLUMNS, 384).index_copy_(0, indices, rows).view(ROWS, COLUMNS, 384)

    assert torch.equal(batch.pad(rows), in_torch())
    compare(benchmark, lambda: batch.pad(rows), {"torch": in_torch})


@pytest.mark.parametrize("peer", ["torch_mask_tokens", "collator, from lists"])
def test_mask_tokens(benchmark: Any, peer: str) -> None:
    transformers = pytest.importorskip("transformers")
    from bert_fast.cli.models import demo_folder

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_folder(), local_files_only=True)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1000, VOCAB_SIZE, (ROWS, COLUMNS), generator=generator)
    ids[:, 0], ids[:, -1] = 101, 102
    special = torch.isin(ids, torch.tensor(SPECIAL_IDS))
    lists = [{"input_ids": row} for row in ids.tolist()]

    def ours() -> masking.MaskedTokens:
        return masking.mask_tokens(ids, special_ids=SPECIAL_IDS, mask_id=MASK_ID, vocab_size=VOCAB_SIZE)

    def core() -> Any:
        return collator.torch_mask_tokens(ids.clone(), special_tokens_mask=special)

    # Both choose at random: equal is the share of each outcome, not the tokens.
    for masked, labels in (core(), ours()[:2]):
        chosen = labels != -100
        assert abs(chosen.float().mean().item() - 0.15) < 0.01
        assert abs((masked[chosen] == MASK_ID).float().mean().item() - 0.8) < 0.02
        assert abs((masked[chosen] == labels[chosen]).float().mean().item() - 0.1) < 0.02
        assert torch.equal(masked[~chosen], ids[~chosen])
    peers = {"torch_mask_tokens": core, "collator, from lists": lambda: collator(lists)}
    compare(benchmark, ours, {peer: peers[peer]}, rounds=100 if peer == "torch_mask_tokens" else 15)


def test_pack(benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(SEED)
    lengths = torch.randint(1, COLUMNS + 1, (10_000,), generator=generator)
    bins = masking.pack(lengths, COLUMNS)
    fill = int(lengths.sum()) / ((len(bins.offsets) - 1) * COLUMNS)
    compare(benchmark, lambda: masking.pack(lengths, COLUMNS), {}, facts={"fill": fill})

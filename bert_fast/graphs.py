"""CUDA graphs of the encoder, for batches so small that launching kernels takes longer than running them.

A graph has fixed sizes, and a batch without padding has another size every time: so graphs are kept for buckets of
token counts. A batch fills the front of its bucket; the rows behind form a sequence without keys, which attention
answers with zeros, and nobody reads their results. Everything that a replay needs from the host travels in one copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .masking import PackedBatch

MAX_TOKENS = 4096
"""Tokens of the largest batch that is replayed: beyond, a GPU is busy longer than the host."""

MAX_GRAPHS = 64

Encode = Callable[[PackedBatch], Tensor]


def bucket_of(count: int, smallest: int = 16) -> int:
    """The next multiple of `smallest` or, where it is more, of an eighth of the next power of two."""
    step = max(smallest, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


class Key(NamedTuple):
    """What a graph has fixed. Two batches of one key differ in numbers alone."""

    tokens: int
    tiles: int
    max_seqlen: int
    has_token_types: bool
    settings: tuple[Any, ...]
    parameters: tuple[int, ...]
    structure: tuple[Any, ...]


class Graph(NamedTuple):
    """
    Attributes:
        numbers: (3 * tokens + 4 * tiles,) int32 on the device: ids, positions, token types and tiles.
        out: (tokens, hidden_size), what a replay fills.
        replay: runs it.
    """

    numbers: Tensor
    out: Tensor
    replay: Callable[[], object]


def capture_cuda(function: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], object]]:
    """The function's result, and what fills it anew."""
    # Kernels are compiled and libraries set up on the first call, which a capture would not survive.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = function()
    return out, graph.replay


class GraphRunner:
    """Graphs of one encoder.

    Args:
        max_tokens: of a batch that is replayed.
        max_graphs: how many are kept; the one that has not been used for longest goes first.
        capture: how a graph is made.
    """

    def __init__(
        self,
        max_tokens: int = MAX_TOKENS,
        max_graphs: int = MAX_GRAPHS,
        capture: Callable[[Callable[[], Tensor], Any], tuple[Tensor, Callable[[], object]]] = capture_cuda,
    ) -> None:
        self.max_tokens = max_tokens
        self.max_graphs = max_graphs
        self.capture = capture
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._pool: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphRunner, (self.max_tokens, self.max_graphs, self.capture)  # graphs are of this process

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self,
        encode: Encode,
        batch: PackedBatch,
        device: torch.device,
        parameters: Iterable[Tensor],
        structure: Iterable[Any],
    ) -> Tensor:
        """encode(batch), by a replay.

        Args:
            encode: computes (tokens, hidden_size) from a batch on the device.
            batch: on the CPU, with ids, of 1 to max_tokens tokens.
            device: where the encoder is.
            parameters: what encode reads; where one of them has moved, a new graph is made.
            structure: what else decides which work encode does: modules, numbers; where one of them is another, too.

        Returns:
            (tokens, hidden_size), a part of memory that the next replay overwrites.
        """
        assert batch.ids is not None
        tokens = bucket_of(batch.total_tokens)
        key = Key(
            tokens,
            bucket_of(batch.tiles.shape[0] + len(_tail_tiles(batch.total_tokens, tokens)), 1),
            ops.max_seqlen_bucket(batch.max_seqlen),
            batch.token_types is not None,
            (device, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
            tuple(x.data_ptr() for x in parameters),
            tuple(structure),
        )
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._make(encode, batch, device, key)
        else:
            self._graphs.move_to_end(key)
            graph.numbers.copy_(_numbers(batch, key, device), non_blocking=True)
        graph.replay()
        return graph.out[: batch.total_tokens]

    def _make(self, encode: Encode, batch: PackedBatch, device: torch.device, key: Key) -> Graph:
        numbers = _numbers(batch, key, device).to(device)
        static = _static_batch(numbers, batch, key)
        if self._pool is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        graph = self._graphs[key] = Graph(numbers, *self.capture(lambda: encode(static), self._pool))
        while len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
        return graph


def _numbers(batch: PackedBatch, key: Key, device: torch.device) -> Tensor:
    """What the host says of a batch, in one piece of memory, zeros where nothing is.

    Page-locked memory is new every time: its allocator hands none out that a copy still reads.
    """
    numbers = torch.zeros(3 * key.tokens + 4 * key.tiles, dtype=torch.int32, pin_memory=device.type == "cuda")
    ids, positions, token_types, tiles = _parts(numbers, key)
    tokens = batch.total_tokens
    assert batch.ids is not None
    ids[:tokens] = batch.ids
    positions[:tokens] = batch.positions
    if batch.token_types is not None:
        token_types[:tokens] = batch.token_types
    tail = torch.tensor(_tail_tiles(tokens, key.tokens), dtype=torch.int32).view(-1, 4)
    own = torch.cat([batch.tiles, tail])
    tiles[: len(own)] = own
    return numbers


def _parts(numbers: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, positions, token types (tokens,) and tiles (tiles, 4) as parts of the one piece of memory."""
    ids, positions, token_types, tiles = numbers.split([key.tokens, key.tokens, key.tokens, 4 * key.tiles])
    return ids, positions, token_types, tiles.view(-1, 4)


def _tail_tiles(tokens: int, bucket: int) -> list[tuple[int, int, int, int]]:
    """The tiles of the rows behind the batch: one sequence, in which nobody is a key."""
    return [(tokens, bucket - tokens, 0, first) for first in range(0, bucket - tokens, ops.TILE_SIZE)]


def _static_batch(numbers: Tensor, batch: PackedBatch, key: Key) -> PackedBatch:
    """The batch that a graph computes: its tensors are parts of `numbers`. Tiles of zeros have no rows."""
    ids, positions, token_types, tiles = _parts(numbers, key)
    return replace(
        batch,
        ids=ids,
        positions=positions,
        token_types=token_types if key.has_token_types else None,
        tiles=tiles,
        max_seqlen=key.max_seqlen,
        cu_seqlens=batch.cu_seqlens.to(numbers.device),  # the kernels read the tiles instead
        indices=None,
        kept=None,
    )

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

def unpad(
    mask: Array, keep: Array | None, keep_first: bool, tile_size: int, threads: int
) -> tuple[Array, Array, Array, Array, Array, int, bool, bool]: ...
def tiles(cu_seqlens: Array, num_keys: Array | None, tile_size: int) -> Array: ...
def pad(packed: Array, indices: Array, out: Array, threads: int) -> None: ...
def pack(lengths: Array, capacity: int) -> tuple[Array, Array]: ...
def mask_tokens(
    ids: Array,
    word_ids: Array | None,
    special_ids: list[int],
    unit: str,
    probability: float,
    mask_probability: float,
    random_probability: float,
    mask_id: int,
    vocab_size: int,
    max_span: int,
    seed: int,
    first_row: int,
    threads: int,
) -> tuple[Array, Array, Array]: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
    tiles: Array,
    tile_size: int,
    scale: float,
    seed: int,
    stream: int,
    dropout_p: float,
    bias: Array | None,
    window: int,
    out: Array,
    log_sum_exp: Array,
    threads: int,
) -> None: ...
def attention_backward(
    grad_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    tiles: Array,
    tile_size: int,
    scale: float,
    seed: int,
    stream: int,
    dropout_p: float,
    bias: Array | None,
    window: int,
    grad_q: Array,
    grad_k: Array,
    grad_v: Array,
    grad_bias: Array | None,
    threads: int,
) -> None: ...
def layer_norm(
    x: Array,
    residual: Array | None,
    weight: Array,
    bias: Array,
    eps: float,
    seed: int,
    stream: int,
    dropout_p: float,
    y: Array,
    mean: Array | None,
    rstd: Array | None,
    threads: int,
) -> None: ...
def layer_norm_backward(
    grad_y: Array,
    x: Array,
    residual: Array | None,
    weight: Array,
    mean: Array,
    rstd: Array,
    seed: int,
    stream: int,
    dropout_p: float,
    grad_x: Array,
    grad_residual: Array | None,
    grad_weight: Array,
    grad_bias: Array,
    threads: int,
) -> None: ...
def embedding(
    word: Array,
    position: Array,
    token_type: Array | None,
    ids: Array,
    positions: Array,
    token_types: Array | None,
    weight: Array,
    bias: Array,
    eps: float,
    out: Array,
    threads: int,
) -> None: ...
def matrix_product(a: Array, b: Array, bias: Array | None, out: Array, threads: int) -> None: ...
def gelu(x: Array, bias: Array | None, approximate: str, y: Array, threads: int) -> None: ...
def gelu_backward(
    grad_y: Array,
    x: Array,
    bias: Array | None,
    approximate: str,
    grad_x: Array,
    grad_bias: Array | None,
    threads: int,
) -> None: ...
def instruction_set() -> str: ...
def has_bfloat16() -> bool: ...
def has_openmp() -> bool: ...

class Encoder:
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: str,
        products: str,
        norm_first: bool = False,
        has_gates: bool = False,
    ) -> None: ...
    def add_layer(
        self,
        arrays: Sequence[Array | None],
        attention_eps: float,
        output_eps: float,
        are_narrow: list[bool],
        watched: list[Array],
        threads: int,
        window: int = -1,
        rotation: int = -1,
    ) -> None: ...
    def is_current(self) -> bool: ...
    def run(
        self,
        x: Array,
        tiles: Array,
        tile_size: int,
        rows: Array | None,
        outputs: list[Array],
        threads: int,
        bias: Array | None = None,
        rotations: Sequence[tuple[Array, Array]] = (),
    ) -> None: ...

class Guard:
    def __init__(self) -> None: ...
    def expect_type(self, instance: object) -> None: ...
    def expect_size(self, mapping: dict[Any, Any]) -> None: ...
    def expect_item(self, mapping: dict[Any, Any], key: object) -> None: ...
    def holds(self) -> bool: ...

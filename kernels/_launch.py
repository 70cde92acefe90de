"""What the kernels share: launch sizes as data, and the arithmetic around them.

Sizes come from static tables, never from tuning at run time: a padding-free batch has a new number of tokens at every
step, and anything keyed on it would compile or tune for ever. Nothing here asks for a device.
"""

from typing import NamedTuple

import torch

# Query rows of one entry in the attention tile list that masking.unpad makes.
TILE_SIZE = 128

# Widest row that the LayerNorm kernels hold in registers.
MAX_LAYER_NORM_WIDTH = 8192


class Launch(NamedTuple):
    """Sizes of one launch.

    Args:
        rows: rows that one program owns.
        columns: columns (keys, queries or features) that it takes at a time.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over the loop.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told. Fusing products with sums is asked for: Triton's own default changes with 3.10."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)

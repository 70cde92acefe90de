"""One torch.library operator per kernel, with its shape function and its backward pass, and the choice of path.

A path is where an operator runs: "triton" (GPU), "cpp" (CPU, float32) or "torch" (everything else). `choose` says which
path a call takes and why, and bert_fast.functional follows it. The functions `launch_*` run the kernels without the
dispatcher: that is the path of inference.
"""

from ._path import (
    MAX_HEAD_SIZE,
    MAX_LAYER_NORM_WIDTH,
    Choice,
    Op,
    Path,
    array,
    choose,
    forced_path,
    has_triton,
)
from .attention import TILE_SIZE, launch_attention, launch_attention_backward, max_seqlen_bucket
from .cross_entropy import launch_linear_cross_entropy
from .embedding import launch_embedding, launch_embedding_backward, launch_embedding_on_cpu
from .gelu import launch_gelu, launch_gelu_backward
from .layer_norm import launch_layer_norm, launch_layer_norm_backward
from .linear import launch_linear, launch_linear_backward
from .pad import launch_pad
from .unpad import host_array, packing_arrays

__all__ = [
    "MAX_HEAD_SIZE",
    "MAX_LAYER_NORM_WIDTH",
    "TILE_SIZE",
    "Choice",
    "Op",
    "Path",
    "array",
    "choose",
    "forced_path",
    "has_triton",
    "host_array",
    "launch_attention",
    "launch_attention_backward",
    "launch_embedding",
    "launch_embedding_backward",
    "launch_embedding_on_cpu",
    "launch_gelu",
    "launch_gelu_backward",
    "launch_layer_norm",
    "launch_layer_norm_backward",
    "launch_linear",
    "launch_linear_backward",
    "launch_linear_cross_entropy",
    "launch_pad",
    "max_seqlen_bucket",
    "packing_arrays",
]

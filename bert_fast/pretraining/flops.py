"""Floating-point operations of training steps, and the peak rates that they are measured against."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import functional
from ..config import BertConfig

__all__ = ["model_flops_utilisation", "peak_flops", "training_flops"]

# Of the products measured on a CPU: caches and thread pools favour different ones.
SIZES = (512, 1024, 2048)
ROUNDS = 5
SECONDS = 1.0


class Peaks(NamedTuple):
    """Dense operations a second: bfloat16 and float16 with sums in float32, TensorFloat-32, float32."""

    half: float
    tf32: float
    float32: float


# By the whole name: parts of a GPU (MIG), laptop and export versions are slower than their namesakes. Data sheets name
# rates with sparsity, which are twice these.
PEAKS = (
    # NVIDIA H100 Tensor Core GPU Architecture, 2022; H200 data sheet, 2024
    (r"NVIDIA (H100 80GB HBM3|H200)", Peaks(989.4e12, 494.7e12, 66.9e12)),
    (r"NVIDIA H100 PCIe", Peaks(756e12, 378e12, 51.2e12)),
    # NVIDIA A100 Tensor Core GPU data sheet, 2021
    (r"(NVIDIA )?A100(-SXM4-[48]0GB|-PCIE-[48]0GB| 80GB PCIe)", Peaks(312e12, 156e12, 19.5e12)),
    # NVIDIA L4 data sheet, 2023; NVIDIA L40S data sheet, 2023; NVIDIA Ada GPU Architecture, 2022
    (r"NVIDIA L4", Peaks(121e12, 60e12, 30.3e12)),
    (r"NVIDIA L40S", Peaks(362.05e12, 183e12, 91.6e12)),
    (r"NVIDIA GeForce RTX 4090", Peaks(165.2e12, 82.6e12, 82.6e12)),
    # AMD Instinct MI300X data sheet, 2023
    (r"AMD Instinct MI300X", Peaks(1307.4e12, 653.7e12, 163.4e12)),
)


def training_flops(config: BertConfig, lengths_squared: int, tokens: int, predicted: int, sequences: int) -> float:
    """Operations of a forward and a backward pass of BERT's pretraining, in its matrix products alone.

    A multiplication with its addition counts as two, the backward pass as two forward ones (Kaplan et al. 2020, section
    2.1). Nothing is counted that the model could do without, such as a forward pass that is computed again.

    Args:
        config: of the model.
        lengths_squared: sum over the sequences of their length squared.
        tokens: of all sequences, without padding.
        predicted: tokens with a masked-LM label, which alone meet the vocabulary.
        sequences: those that the pooler and the next-sentence head see; 0 where training has neither.

    Returns:
        Operations.

    Raises:
        ValueError: a negative count.
    """
    counts = {"lengths_squared": lengths_squared, "tokens": tokens, "predicted": predicted, "sequences": sequences}
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    width, layers = config.hidden_size, config.num_hidden_layers
    layer = 2 * (4 * width**2 + 2 * width * config.intermediate_size)
    encoder = layers * (tokens * layer + 4 * width * lengths_squared)
    masked_lm = predicted * 2 * (width**2 + width * config.vocab_size)
    next_sentence = sequences * 2 * (width**2 + 2 * width)
    return 3.0 * (encoder + masked_lm + next_sentence)


def model_flops_utilisation(flops: float, seconds: float, peak: float) -> float:
    """MFU, the share of the peak rate that the model's own operations reach (Chowdhery et al. 2022, section 4.1).

    Args:
        flops: operations that the model needs, as training_flops counts them.
        seconds: wall time that they took.
        peak: operations a second of all devices together.

    Raises:
        ValueError: negative operations, or a time or a peak that is not above 0.
    """
    if flops < 0:
        raise ValueError(f"flops is {flops}; it must be at least 0")
    for name, value in (("seconds", seconds), ("peak", peak)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    return flops / seconds / peak


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that one device can reach in dense matrix products.

    Of a GPU it is the published figure; of a CPU the best of a few products with the present number of threads, which
    the first call measures in about a second.

    Args:
        device: a GPU or the CPU.
        dtype: that of the products: float32, bfloat16 or float16. For float32 on a GPU it counts whether torch's
            settings permit TensorFloat-32.

    Returns:
        Operations a second, or None where nothing is known of the device.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; torch.float32, torch.bfloat16 or torch.float16 is needed")
    if device.type == "cpu":
        return _measured(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for pattern, peaks in PEAKS:
        if re.fullmatch(pattern, name):
            if dtype != torch.float32:
                return peaks.half
            return peaks.tf32 if _has_tf32() else peaks.float32
    return None


def _has_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.9 and later, where the older name may raise
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


@cache
def _measured(dtype: torch.dtype, threads: int) -> float:  # noqa: ARG001
    """The best rate of square products by torch and by our own kernels; `threads` is part of the cache's key."""
    best = 0.0
    end = time.perf_counter() + SECONDS
    generator = torch.Generator().manual_seed(0)  # torch's own belongs to the training
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for size in SIZES:
            operations = 2.0 * size**3
            if best and 2 * (ROUNDS + 1) * operations / best > end - time.perf_counter():
                break
            x, weight = (torch.rand(size, size, generator=generator).to(dtype) for _ in range(2))
            for product in (linear, functional.linear):
                times = [_seconds(product, x, weight) for _ in range(ROUNDS + 1)]
                best = max(best, operations / statistics.median(times[1:]))
    return best


def _seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    product(x, weight)
    return time.perf_counter() - start

"""Compiles every Triton kernel for real GPUs, on a machine that has none, and tells what each binary needs.

    python tests/compile_kernels.py [PART PARTS]     JSON, a list of binaries; of PARTS processes this is number PART
    python tests/compile_kernels.py variants         JSON, how many binaries each kernel needs for many token counts
    python tests/compile_kernels.py training         seconds until the kernels of a BERT-base training step are there

The kernels' own launchers run, on CPU tensors; what they would launch is recorded, specialised as Triton does it and
compiled with the options of the launch tables. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from bert_fast.kernels import attention, cross_entropy, embedding, gelu, layer_norm

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HOPPER = ("sm_90",)

ALL_TARGETS = "BERT_FAST_ALL_TARGETS"  # in the environment

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Launch(NamedTuple):
    """One launch of a kernel: the arguments and the keywords (compile-time constants, options) that it got."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Binary(NamedTuple):
    """
    Attributes:
        kernel, dtype, size, target: what was compiled; size is that of a head or of a row.
        warps, stages: of the launch table.
        registers: of a thread.
        spills: bytes of local memory, or (AMD) registers and bytes, that the registers had no room for.
        shared: bytes of shared memory.
    """

    kernel: str
    dtype: str
    size: str
    target: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int


class Recorder:
    """Stands in for a kernel and keeps what it would launch."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.launches.append(Launch(self.kernel, arguments, keywords))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    kernels = [
        (module, name, value)
        for module in (attention, cross_entropy, embedding, gelu, layer_norm)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    ]
    for module, name, kernel in kernels:
        setattr(module, name, Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def launch_attention(
    dtype: torch.dtype,
    head_size: int,
    tokens: int,
    max_seqlen: int,
    dropout_p: float = 0.0,
    has_bias: bool = False,
    window: int | None = None,
) -> list[Launch]:
    """q, k and v are slices of one tensor, as a fused linear layer gives them."""
    q, k, v = torch.empty(tokens, 3, 12, head_size, dtype=dtype).unbind(1)
    tiles = torch.zeros(max(tokens // 100, 1), 4, dtype=torch.int32)
    bias = torch.empty(12, 2 * max_seqlen - 1) if has_bias else None
    extras = attention.Extras(torch.zeros(1, dtype=torch.int64), 3, dropout_p, bias, window)
    with recording() as launches:
        out, lse = attention.attention(q, k, v, tiles, max_seqlen, 0.125, extras)
        attention.attention_backward(out, q, k, v, out, lse, tiles, max_seqlen, 0.125, extras, wants_grad_bias=has_bias)
    return launches


def launch_layer_norm(
    dtype: torch.dtype, width: int, tokens: int, has_residual: bool, dropout_p: float = 0.0
) -> list[Launch]:
    """With dropout also with the bias of the linear layer before."""
    x, weight, statistic = torch.empty(tokens, width, dtype=dtype), torch.empty(width), torch.empty(tokens)
    input_bias = weight if dropout_p > 0 else None
    seed = torch.zeros(1, dtype=torch.int64)
    addend = layer_norm.Addend(input_bias, seed, 2, dropout_p, x if has_residual else None)
    with recording() as launches:
        layer_norm.layer_norm(x, addend, weight, weight, 1e-12)
        layer_norm.layer_norm_backward(x, x, addend, weight, statistic, statistic)
    return launches


def launch_embedding(dtype: torch.dtype, width: int, tokens: int, dropout_p: float) -> list[Launch]:
    word, position, token_type = (torch.empty(entries, width, dtype=dtype) for entries in (30522, 512, 2))
    ids, weight, statistic = torch.zeros(tokens, dtype=torch.int64), torch.empty(width), torch.empty(tokens)
    tables = embedding.Tables(word, position, token_type, ids, ids.int(), ids)
    seed = torch.zeros(1, dtype=torch.int64)
    with recording() as launches:
        y, _, _ = embedding.embedding(tables, weight, weight, 1e-12, seed, 0, dropout_p)
        embedding.embedding_backward(y, tables, weight, statistic, statistic, seed, 0, dropout_p)
    return launches


def launch_cross_entropy(dtype: torch.dtype, classes: int, rows: int) -> list[Launch]:
    with recording() as launches:
        targets = torch.zeros(rows, dtype=torch.int64)
        cross_entropy.cross_entropy(torch.empty(rows, classes, dtype=dtype), targets, has_gradient=True)
    return launches


def launch_gelu(dtype: torch.dtype, width: int, tokens: int, has_bias: bool, approximate: str) -> list[Launch]:
    x, bias = torch.empty(tokens, width, dtype=dtype), torch.empty(width) if has_bias else None
    with recording() as launches:
        gelu.gelu(x, bias, approximate)
        gelu.gelu_backward(x, x, bias, approximate)
    return launches


def specialise(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """The source that Triton would compile for these arguments (types, constants, divisibility) and its options."""
    kernel, backend = launch.kernel, make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = binder(*launch.arguments, **launch.keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, launch.keywords, bound, specialisation, {})
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def needs(binary: Any, target: GPUTarget) -> tuple[int, int]:
    """Registers of a thread, and bytes of memory for what did not fit into them.

    AMD's scalar registers, which hold masks, spill into lanes of vector ones; what these then lack is in the bytes.
    """
    if target.backend == "hip":
        metadata = binary.asm["amdgcn"]
        registers, spilled, stack = (
            int(re.search(rf"\.{name}:\s+(\d+)", metadata)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return registers, 4 * spilled + stack
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def compile_launch(launch: Launch, dtype: torch.dtype, size: str, target_name: str) -> Binary:
    target = TARGETS[target_name]
    source, options = specialise(launch, target)
    binary = triton.compile(source, target=target, options=options)
    return Binary(
        launch.kernel.__name__.strip("_"), str(dtype).removeprefix("torch."), size, target_name,
        options["num_warps"], options["num_stages"], *needs(binary, target), binary.metadata.shared,
    )  # fmt: skip


def jobs() -> Iterator[tuple[list[Launch], torch.dtype, str, tuple[str, ...]]]:
    """What is compiled: launches, dtype, size and targets. fp16 and bf16 have the same code, so fp16 comes once.

    All targets have what a BERT-base model needs; the rest is compiled for them where ALL_TARGETS says so.
    """
    everywhere = tuple(TARGETS)
    elsewhere = everywhere if os.environ.get(ALL_TARGETS) else HOPPER
    for head_size in (32, 64, 128):
        for max_seqlen in (64, 512):
            size = f"{head_size}, rows of {max_seqlen}"
            targets = everywhere if (head_size, max_seqlen) == (64, 512) else elsewhere
            yield launch_attention(BF16, head_size, 1000, max_seqlen), BF16, size, targets
    for head_size, targets in ((32, HOPPER), (64, everywhere), (128, elsewhere)):
        yield launch_attention(FP32, head_size, 1000, 512), FP32, str(head_size), targets
    for head_size, targets in ((32, HOPPER), (64, everywhere), (128, elsewhere)):
        size = f"{head_size}, dropout"
        yield launch_attention(BF16, head_size, 1000, 512, dropout_p=0.1), BF16, size, targets
    yield launch_attention(BF16, 64, 1000, 64, dropout_p=0.1), BF16, "64, rows of 64, dropout", HOPPER
    yield launch_attention(BF16, 64, 1000, 512, 0.1, has_bias=True), BF16, "64, dropout, bias", everywhere
    yield launch_attention(FP32, 64, 1000, 512, 0.1, has_bias=True), FP32, "64, dropout, bias", everywhere
    for head_size in (32, 64, 128):
        yield launch_attention(BF16, head_size, 1000, 512, window=64), BF16, f"{head_size}, window", elsewhere
    yield launch_attention(BF16, 64, 1000, 512, 0.1, window=64), BF16, "64, dropout, window", elsewhere
    yield launch_attention(FP32, 64, 1000, 512, 0.1, window=64), FP32, "64, dropout, window", elsewhere
    yield launch_attention(FP16, 64, 1000, 512), FP16, "64, rows of 512", HOPPER
    yield launch_attention(BF16, 80, 1000, 512), BF16, "80, rows of 512", HOPPER  # narrower than its block
    for dtype in (BF16, FP32):
        for width in (768, 1024, 4096):
            targets = everywhere if width == 768 else elsewhere
            yield launch_layer_norm(dtype, width, 1000, has_residual=True), dtype, str(width), targets
            size = f"{width}, bias, dropout"
            yield launch_layer_norm(dtype, width, 1000, True, dropout_p=0.1), dtype, size, targets
        for dropout_p in (0.0, 0.1):
            size = f"768, dropout {dropout_p}"
            yield launch_embedding(dtype, 768, 1000, dropout_p), dtype, size, everywhere
        yield launch_cross_entropy(dtype, 30522, 1000), dtype, "30522", everywhere
        for approximate in ("none", "tanh"):
            size = f"3072, {approximate}"
            yield launch_gelu(dtype, 3072, 1000, has_bias=True, approximate=approximate), dtype, size, everywhere
    yield launch_layer_norm(FP32, 8192, 1000, has_residual=True), FP32, "8192", elsewhere
    yield launch_layer_norm(FP16, 768, 1000, has_residual=False), FP16, "768, no residual", HOPPER
    yield launch_gelu(FP16, 3072, 1000, has_bias=False, approximate="none"), FP16, "3072, no bias", HOPPER


def compile_part(part: int, parts: int) -> list[Binary]:
    work = [
        (launch, dtype, size, target)
        for launches, dtype, size, targets in jobs()
        for launch in launches
        for target in targets
    ]
    return [compile_launch(*each) for each in work[part::parts]]


def random_batches(count: int) -> Iterator[tuple[int, int]]:
    """(tokens, longest sequence) of batches as training without padding has them, the odd sizes first."""
    yield from ((tokens, 1 + tokens % 512) for tokens in (1, 2, 3, 15, 16, 17, 63, 64, 65, 128, 256, 512, 4096))
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        lengths = torch.randint(1, 513, (int(torch.randint(1, 65, (), generator=generator)),), generator=generator)
        yield int(lengths.sum()), int(lengths.max())


def training_step(tokens: int, max_seqlen: int) -> list[Launch]:
    """The kernels of a BERT-base training step in bfloat16."""
    return [
        *launch_attention(BF16, 64, tokens, max_seqlen, dropout_p=0.1),
        *launch_layer_norm(BF16, 768, tokens, has_residual=True, dropout_p=0.1),
        *launch_gelu(BF16, 3072, tokens, has_bias=True, approximate="none"),
        *launch_embedding(BF16, 768, tokens, dropout_p=0.1),
        *launch_cross_entropy(BF16, 30522, tokens),
    ]


def count_variants() -> dict[str, int]:
    """Distinct binaries of each kernel, over 1,000 batches, for one dtype, size and set of features."""
    seen: dict[str, set[str]] = {}
    for tokens, max_seqlen in random_batches(1000):
        for launch in training_step(tokens, max_seqlen):
            source, options = specialise(launch, TARGETS["sm_90"])
            key = str((source.signature, source.constants, source.attrs, options))
            seen.setdefault(launch.kernel.__name__.strip("_"), set()).add(key)
    return {name: len(keys) for name, keys in seen.items()}


def compile_training_step() -> None:
    """What a first step needs; from Triton's disk cache, where it has been compiled before."""
    for launch in training_step(1000, 512):
        source, options = specialise(launch, TARGETS["sm_90"])
        triton.compile(source, target=TARGETS["sm_90"], options=options)


def main(arguments: list[str]) -> None:
    if arguments == ["training"]:
        start = time.perf_counter()
        compile_training_step()
        print(f"{time.perf_counter() - start:.2f}")
        return
    if arguments == ["variants"]:
        print(json.dumps(count_variants()))
        return
    part, parts = map(int, arguments or ("0", "1"))
    print(json.dumps([binary._asdict() for binary in compile_part(part, parts)]))


if __name__ == "__main__":
    main(sys.argv[1:])

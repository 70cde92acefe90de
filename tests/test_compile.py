"""Every Triton kernel compiled for four GPUs, on this machine: nothing spills, everything fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from compile_kernels import Binary

SCRIPT = Path(__file__).with_name("compile_kernels.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")

KERNELS = [
    "attention_kernel",
    "attention_grad_q_kernel",
    "attention_grad_kv_kernel",
    "attention_grad_bias_kernel",
    "layer_norm_kernel",
    "layer_norm_grad_kernel",
    "gelu_kernel",
    "gelu_grad_kernel",
    "embedding_kernel",
    "embedding_grad_kernel",
    "cross_entropy_kernel",
]

# Shared memory that one program may have.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def start(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """Without the interpreter that this process may run in, and with nothing compiled before."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments],
        env={**environment, "TRITON_CACHE_DIR": str(cache)}, cwd=SCRIPT.parents[1], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def result(process: subprocess.Popen[str]) -> Any:
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> list[Binary]:
    """All of them, from two processes; printed as a table, which pytest -s shows."""
    pytest.importorskip("triton")
    from compile_kernels import Binary

    cache = tmp_path_factory.mktemp("triton")
    processes = [start(cache, str(part), "2") for part in range(2)]
    try:
        found = [Binary(**fields) for process in processes for fields in result(process)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found.sort(key=lambda binary: (KERNELS.index(binary.kernel), binary.dtype, binary.size, binary.target))
    print("\n" + table(found))
    return found


def table(found: list[Binary]) -> str:
    rows = [list(found[0]._fields), *(list(map(str, binary)) for binary in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


@pytest.mark.parametrize("target", SHARED_LIMITS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_fits(binaries: list[Binary], kernel: str, target: str) -> None:
    mine = [binary for binary in binaries if (binary.kernel, binary.target) == (kernel, target)]
    assert {"float32", "bfloat16"} <= {binary.dtype for binary in mine}
    assert [binary for binary in mine if binary.spills > 0] == []
    assert [binary for binary in mine if binary.shared > SHARED_LIMITS[target]] == []
    assert all(0 < binary.registers <= 512 for binary in mine)


def test_every_kernel_was_compiled(binaries: list[Binary]) -> None:
    assert {binary.kernel for binary in binaries} == set(KERNELS)


def test_binaries_do_not_depend_on_the_number_of_tokens(tmp_path: Path) -> None:
    """A batch without padding has another number at every step; a kernel that is compiled for each never stops."""
    pytest.importorskip("triton")
    expected = dict.fromkeys(KERNELS, 1)
    expected["attention_kernel"] = 2  # rows of at most kernels.attention.SHORT tokens have sizes of their own
    del expected["attention_grad_bias_kernel"]
    assert result(start(tmp_path, "variants")) == expected

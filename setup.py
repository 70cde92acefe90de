"""Builds bert_fast._C and lists the packages; everything else stands in pyproject.toml."""

import os
import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

COMPILE_ARGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
LINK_ARGS: list[str] = []
if sys.platform == "linux":
    # The extension is loaded after torch and so shares the libgomp, and with it the threads, that torch brought.
    COMPILE_ARGS.append("-fopenmp")
    LINK_ARGS.append("-fopenmp")
elif sys.platform == "darwin":
    COMPILE_ARGS.append("-fopenmp-simd")
else:
    COMPILE_ARGS = ["/O2", "/openmp:experimental"]
# CFLAGS come too early to lower the optimisation, which `make sanitize` does.
COMPILE_ARGS += os.environ.get("BERT_FAST_COMPILE_ARGS", "").split()

setup(
    packages=[
        "bert_fast",
        "bert_fast.cli",
        "bert_fast.kernels",
        "bert_fast.ops",
        "bert_fast.pretraining",
        "bert_fast.swap",
        "bert_fast.tasks",
        "bert_fast.tasks.data",
        "bert_fast.tasks.vectors",
    ],
    package_data={"bert_fast": ["py.typed", "data/*.txt"]},
    ext_modules=[
        Pybind11Extension(
            "bert_fast._C",
            sources=[
                "csrc/bindings.cpp",
                "csrc/masking.cpp",
                "csrc/encoder.cpp",
                "csrc/cpu/dispatch.cpp",
                "csrc/cpu/portable.cpp",
                "csrc/cpu/avx2.cpp",
                "csrc/cpu/avx512.cpp",
            ],
            depends=[
                "csrc/masking.h",
                "csrc/arena.h",
                "csrc/encoder.h",
                "csrc/guard.h",
                "csrc/philox.h",
                "csrc/pool.h",
                "csrc/cpu/kernels.h",
                "csrc/cpu/standard.h",
                "csrc/cpu/team.h",
                "csrc/cpu/common.inl",
                "csrc/cpu/panels.inl",
                "csrc/cpu/gemm.inl",
                "csrc/cpu/bfloat16.inl",
                "csrc/cpu/int8.inl",
                "csrc/cpu/attention.inl",
                "csrc/cpu/gelu.inl",
                "csrc/cpu/layer_norm.inl",
                "csrc/cpu/encoder.inl",
                "csrc/cpu/masking.inl",
                "csrc/cpu/philox.inl",
                "csrc/cpu/instantiate.inl",
            ],
            cxx_std=17,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
        )
    ],
)

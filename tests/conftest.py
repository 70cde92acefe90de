"""Where the kernel tests run: C++, Triton (interpreted, or compiled where there is a CUDA device) and torch."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before bert_fast.kernels

from tolerance import Place  # noqa: E402

HALVES = (torch.float16, torch.bfloat16)

CPP = [Place("cpp", "cpu", torch.float32)]
TORCH = [Place("torch", "cpu", dtype) for dtype in (torch.float32, torch.float64, *HALVES)]
INTERPRETER = [Place("triton", "cpu", dtype) for dtype in (torch.float32, *HALVES)]
GPU = [Place("triton", "cuda", dtype) for dtype in (torch.float32, *HALVES)]

# tl.dot of the interpreter multiplies the bit patterns of bfloat16 as integers.
WITHOUT_DOT_OF_BFLOAT16 = [place for place in INTERPRETER if place.dtype != torch.bfloat16]


def _params(places: list[Place]) -> list[object]:
    return [pytest.param(place, id=str(place), marks=_marks(place)) for place in places]


def _marks(place: Place) -> list[pytest.MarkDecorator]:
    if place.path != "triton":
        return []
    return [
        pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
        pytest.mark.skipif(place.is_interpreter and HAS_CUDA, reason="with a CUDA device the kernels run compiled"),
        *([pytest.mark.gpu] if place.device == "cuda" else []),
    ]


@pytest.fixture(params=_params([*CPP, *INTERPRETER, *GPU, *TORCH]))
def place(request: pytest.FixtureRequest) -> Place:
    """Every place where layer_norm and gelu run."""
    return _place(request)


@pytest.fixture(params=_params([*CPP, *WITHOUT_DOT_OF_BFLOAT16, *GPU, *TORCH]))
def attention_place(request: pytest.FixtureRequest) -> Place:
    """Every place where attention runs."""
    return _place(request)


@pytest.fixture(params=_params([*INTERPRETER, *GPU]))
def triton_place(request: pytest.FixtureRequest) -> Place:
    """Every place where Triton's layer_norm and gelu run."""
    return _place(request)


@pytest.fixture(params=_params([*CPP, *INTERPRETER, *GPU]))
def kernel_place(request: pytest.FixtureRequest) -> Place:
    """Every place where layer_norm has a kernel."""
    return _place(request)


@pytest.fixture(params=_params([*CPP, *GPU]))
def fast_place(request: pytest.FixtureRequest) -> Place:
    """Places where large shapes take no time."""
    return _place(request)


def _place(request: pytest.FixtureRequest) -> Place:
    place = request.param
    assert isinstance(place, Place)
    return place


# Files of few tests that take long, which come first so that no process has one left when the other is done.
LONG = (
    *("test_compile", "test_cpu_script", "test_gpu_script", "test_ops", "test_embed_ray", "test_cli"),
    *("test_pretraining_distributed", "test_pretraining_loop", "test_torch_compile", "test_distributed"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

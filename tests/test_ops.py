"""bert_fast.ops and bert_fast.functional: registration, the choice of path, arguments, threads and instruction sets."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tolerance import GRANTED_ULPS, Place, assert_twice_torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import bert_fast._C
from bert_fast import functional, masking, ops, reference

ROOT = Path(__file__).parents[1]

CU_SEQLENS = torch.tensor([0, 5, 5, 8], dtype=torch.int32)
MAX_SEQLEN = 5
TILES = masking.make_tiles(CU_SEQLENS, torch.tensor([3, 0, 3], dtype=torch.int32))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).requires_grad_()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.attention(q, k, v, CU_SEQLENS, MAX_SEQLEN, tiles=TILES)


# Every public function as one of tensors alone, with inputs for it.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "attention": (attend, tuple(draw(8, 3, 7, seed=seed) for seed in range(3))),
    "layer_norm": (functional.layer_norm, (draw(4, 3, 7), draw(7, seed=1), draw(7, seed=2))),
    "layer_norm_residual": (
        lambda x, weight, bias, residual: functional.layer_norm(x, weight, bias, 1e-5, residual),
        (draw(4, 7), draw(7, seed=1), draw(7, seed=2), draw(4, 7, seed=3)),
    ),
    "gelu": (functional.gelu, (draw(4, 3, 7),)),
    "gelu_bias": (lambda x, bias: functional.gelu(x, bias, "tanh"), (draw(4, 7), draw(7, seed=1))),
    "pad": (lambda x: functional.pad(x, torch.tensor([4, 0, 3]), 6), (draw(3, 2, 7),)),
}

each_function = pytest.mark.parametrize(("function", "inputs"), FUNCTIONS.values(), ids=FUNCTIONS)


# ---- registration ----------------------------------------------------------------------------------------------------


def q_k_v(*, has_grad: bool) -> list[Tensor]:
    return [x.detach().requires_grad_(has_grad) for x in draw(8, 3, 3, 7).unbind(1)]


OPS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "attention": lambda: (*q_k_v(has_grad=True), TILES, MAX_SEQLEN, 0.4),
    "attention_backward": lambda: (
        draw(8, 3, 7, seed=1), *q_k_v(has_grad=False), draw(8, 3, 7, seed=2), draw(3, 8, seed=3), TILES, MAX_SEQLEN,
        0.4,
    ),
    "layer_norm": lambda: (leaf(5, 7), None, leaf(7, seed=1), leaf(7, seed=2), 1e-5),
    "layer_norm-residual": lambda: (leaf(5, 7), leaf(5, 7, seed=3), leaf(7, seed=1), leaf(7, seed=2), 1e-5),
    "layer_norm_backward": lambda: (
        draw(5, 7), draw(5, 7, seed=1), None, draw(7, seed=2), draw(5, seed=3), draw(5, seed=4),
    ),
    "layer_norm_backward-residual": lambda: (
        draw(5, 7), draw(5, 7, seed=1), draw(5, 7, seed=5), draw(7, seed=2), draw(5, seed=3), draw(5, seed=4),
    ),
    "gelu": lambda: (leaf(5, 7), None, "none"),
    "gelu-bias": lambda: (leaf(5, 7), leaf(7, seed=1), "tanh"),
    "gelu_backward": lambda: (draw(5, 7), draw(5, 7, seed=1), None, "tanh"),
    "gelu_backward-bias": lambda: (draw(5, 7), draw(5, 7, seed=1), draw(7, seed=2), "none"),
    "unpad": lambda: (torch.arange(12).view(3, 4) % 5, None, True),
    "unpad-keep": lambda: (torch.arange(12).view(3, 4) % 5, torch.arange(12).view(3, 4) % 3 == 0, False),
    "linear_cross_entropy": lambda: (
        leaf(5, 7), leaf(9, 7, seed=1), leaf(9, seed=2), torch.tensor([1, -100, 3, 8, 0]), True,
    ),
    "linear_cross_entropy-no_bias": lambda: (draw(5, 7), draw(9, 7, seed=1), None, torch.arange(5), False),
    "linear": lambda: (leaf(5, 7), leaf(9, 7, seed=1), leaf(9, seed=2)),
    "linear-no_bias": lambda: (draw(5, 7), leaf(9, 7, seed=1), None),
    "linear_backward": lambda: (draw(5, 9), draw(5, 7, seed=1), draw(9, 7, seed=2), True, False, True),
    "pad": lambda: (leaf(3, 2, 7), torch.tensor([4, 0, 3]), 6),
    "pad-int64": lambda: (torch.arange(3), torch.tensor([4, 0, 3]), 6),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_every_operator_is_registered_as_torch_wants_it(name: str) -> None:
    operator = getattr(torch.ops.bert_fast, name.partition("-")[0])
    results = torch.library.opcheck(operator.default, OPS[name]())
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_function
def test_compiled_functions_give_the_same(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dynamic: bool
) -> None:
    """One graph, forward and backward; the operators stay whole in it."""

    def differentiate(call: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, seed=9))]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for x, y in zip(differentiate(compiled), differentiate(function), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("name", ["layer_norm", "gelu"])
def test_compiled_functions_take_any_number_of_tokens(name: str) -> None:
    """The first number, then any: a batch without padding has another one at every step."""
    function, (_, *parameters) = FUNCTIONS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for tokens in (3, 5, 8, 13):
        x = draw(tokens, 7).requires_grad_()
        assert torch.equal(compiled(x, *parameters), function(x, *parameters))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "pad"])  # which is linear
def test_second_derivatives_are_refused(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    (grad, *_) = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="no second derivative"):
        torch.autograd.grad((grad * leaves[0]).sum(), leaves)


def test_the_kernels_have_the_same_limits() -> None:
    pytest.importorskip("triton")
    from bert_fast.kernels import _launch

    assert _launch.TILE_SIZE == ops.TILE_SIZE
    assert _launch.MAX_LAYER_NORM_WIDTH == ops.MAX_LAYER_NORM_WIDTH


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_operators_refuse_what_has_no_kernel(dtype: torch.dtype) -> None:
    x = torch.zeros(8, 7, dtype=dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    with pytest.raises(NotImplementedError, match=rf"gelu has no kernel here: {dtype_name} on the CPU"):
        torch.ops.bert_fast.gelu(x, None, "none")
    with pytest.raises(NotImplementedError, match=rf"layer_norm has no kernel here: {dtype_name} on the CPU"):
        torch.ops.bert_fast.layer_norm(x, None, x[0], x[0], 1e-5)
    with pytest.raises(NotImplementedError, match=rf"attention has no kernel here: {dtype_name} on the CPU"):
        torch.ops.bert_fast.attention(x[:, None], x[:, None], x[:, None], TILES, MAX_SEQLEN, 1.0)


# ---- the choice of path ----------------------------------------------------------------------------------------------

HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("op", "device", "dtype", "width", "path", "reason"),
    [
        ("attention", "cpu", torch.float32, 128, "cpp", "float32 on the CPU"),
        ("attention", "cpu", torch.float32, 129, "torch", "head size 129 is above 128"),
        ("attention", "cuda", HALF, 129, "torch", "head size 129 is above 128"),
        ("attention", "cuda", HALF, 128, "triton", "bfloat16 on cuda"),
        ("layer_norm", "cuda", torch.float16, 8192, "triton", "float16 on cuda"),
        ("layer_norm", "cuda", torch.float16, 8193, "torch", "width 8193 is above 8192"),
        ("layer_norm", "cpu", torch.float32, 8193, "cpp", "float32 on the CPU"),
        ("gelu", "cuda", torch.float32, 10**6, "triton", "float32 on cuda"),
        ("gelu", "cuda", torch.float64, 7, "torch", "float64: the kernels take float32, float16 and bfloat16"),
        ("gelu", "cpu", torch.float64, 7, "torch", "float64 on the CPU: the C++ kernels take float32"),
        ("gelu", "cpu", HALF, 7, "torch", "bfloat16 on the CPU: the C++ kernels take float32"),
        ("gelu", "mps", torch.float32, 7, "torch", "device mps: the kernels are for cuda and cpu"),
    ],
)
def test_choose(op: ops.Op, device: str, dtype: torch.dtype, width: int, path: str, reason: str) -> None:
    pytest.importorskip("triton")
    choice = ops.choose(op, device, dtype, width)
    assert choice.path == path
    assert choice.reason.startswith(reason)


def test_without_triton_the_path_is_torch() -> None:
    code = """
import torch
from bert_fast import ops
ops._path.find_spec = lambda name: None
print(ops.choose("gelu", "cuda", torch.bfloat16, 7))
"""
    assert run_python(code).stdout.strip() == "Choice(path='torch', reason='triton is not installed')"


def test_forced_path_ends_with_its_block() -> None:
    free = ops.choose("gelu", "cpu", torch.float32, 7)
    with ops.forced_path("torch"):
        assert ops.choose("gelu", "cpu", torch.float32, 7) == ("torch", "forced")
        with ops.forced_path("triton"):
            assert ops.choose("gelu", "cpu", torch.float32, 7).path == "triton"
        assert ops.choose("gelu", "cpu", torch.float32, 7).path == "torch"
    with pytest.raises(KeyError), ops.forced_path("torch"):
        raise KeyError
    assert ops.choose("gelu", "cpu", torch.float32, 7) == free


def test_forced_path_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def spy(*arguments: Any, **keywords: Any) -> None:
        called.append("cpp")
        gelu(*arguments, **keywords)

    gelu = bert_fast._C.gelu
    monkeypatch.setattr(bert_fast._C, "gelu", spy)
    x = draw(3, 7)
    functional.gelu(x)
    assert called == ["cpp"]
    with ops.forced_path("torch"):
        assert torch.equal(functional.gelu(x), F.gelu(x))
    assert called == ["cpp"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@each_function
def test_other_dtypes_on_the_cpu_take_torchs_path(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    converted = [x.to(dtype) for x in inputs]
    out = function(*converted)
    assert out.dtype == dtype
    with ops.forced_path("torch"):
        assert torch.equal(function(*converted), out)
    exact = function(*(x.double() for x in converted))
    bound = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((out.double() - exact).abs().max()) <= bound


@each_function
def test_without_gradients_the_result_is_the_same_to_the_bit(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    leaves = [x.clone().requires_grad_() for x in inputs]
    recorded = function(*leaves)
    assert recorded.requires_grad
    plain = function(*inputs)
    with torch.no_grad():
        unrecorded = function(*leaves)
    with torch.inference_mode():
        inferred = function(*leaves)
        on_inference_tensors = function(*(x.clone() for x in inputs))
    assert inferred.is_inference()
    for out in (plain, unrecorded, inferred, on_inference_tensors):
        assert not out.requires_grad
        assert torch.equal(out, recorded)


@each_function
def test_any_one_input_may_need_a_gradient(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for index, grad in enumerate(expected):
        some = [x.clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
        out = function(*some)
        assert torch.equal(torch.autograd.grad(out, some[index], torch.ones_like(out))[0], grad)


def test_torchs_attention_is_as_right_as_cpp() -> None:
    """Both against float64, sequences without keys and hidden rows among them."""
    qkv = draw(8, 3, 3, 7)
    grad_out = draw(8, 3, 7, seed=1)

    def differentiate(dtype: torch.dtype, path: ops.Path) -> tuple[Tensor, Tensor]:
        fused = qkv.to(dtype).requires_grad_()
        with ops.forced_path(path):
            out = attend(*fused.unbind(1))
            (grad,) = torch.autograd.grad(out, fused, grad_out.to(dtype))
        return out.detach(), grad

    exact = differentiate(torch.float64, "torch")
    for cpp, torchs, truth in zip(
        differentiate(torch.float32, "cpp"), differentiate(torch.float32, "torch"), exact, strict=True
    ):
        assert_twice_torch("cpp", cpp, torchs, truth)
        assert_twice_torch("torch", torchs, cpp, truth)


def test_dropout_takes_torchs_path_and_keeps_the_mean() -> None:
    """Attention of 4,000 equal sequences: the mean over them is that without dropout."""
    torch.manual_seed(0)
    sequences, length = 4000, 5
    one = torch.rand(length, 3, 2, 7)
    q, k, v = one.repeat(sequences, 1, 1, 1).unbind(1)
    cu_seqlens = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32)
    out = functional.attention(q, k, v, cu_seqlens, length, dropout_p=0.25)
    expected = functional.attention(q[:length], k[:length], v[:length], cu_seqlens[:2], length)
    samples = out.view(sequences, length, 2, 7)
    assert float(samples.std(0).min()) > 0.05
    deviations = (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(sequences))
    assert float(deviations.abs().max()) < 5
    assert float(deviations.abs().mean()) < 2
    assert not torch.equal(functional.attention(q, k, v, cu_seqlens, length, dropout_p=0.25), out)


def test_without_tiles_they_are_made() -> None:
    q, k, v = (draw(8, 3, 7, seed=seed) for seed in range(3))
    tiles = masking.make_tiles(CU_SEQLENS)
    expected = functional.attention(q, k, v, CU_SEQLENS, MAX_SEQLEN, tiles=tiles)
    assert torch.equal(functional.attention(q, k, v, CU_SEQLENS, MAX_SEQLEN), expected)
    exact = reference.attention(q.double(), k.double(), v.double(), CU_SEQLENS, 7**-0.5)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_on_the_cpu(dtype: torch.dtype) -> None:
    """Results keep the dtype of the activations, whatever that of the weights, and torch's accuracy."""
    place = Place("cpp" if dtype == torch.float32 else "torch", "cpu", dtype)
    x, residual, weight, bias = (
        draw(5, 132).to(dtype),
        draw(5, 132, seed=1).to(dtype),
        draw(132, seed=2),
        draw(132, seed=3),
    )
    q, k, v = (draw(8, 3, 7, seed=seed).to(dtype) for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        normalised = functional.layer_norm(x, weight, bias, 1e-5, residual)
        activated = functional.gelu(x, bias)
        attended = attend(q, k, v)
        dropped = functional.attention(q, k, v, CU_SEQLENS, MAX_SEQLEN, dropout_p=0.5)
    assert normalised.dtype == activated.dtype == attended.dtype == dropped.dtype == place.dtype
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5, residual.double())
    assert_twice_torch("layer_norm", normalised, F.layer_norm(x + residual, (132,), weight, bias, 1e-5), exact)
    assert_twice_torch("gelu", activated, F.gelu(x + bias.to(dtype)), reference.gelu(x.double(), bias.double()))
    with ops.forced_path("torch"):
        truth = attend(q.double(), k.double(), v.double())
        assert_twice_torch("attention", attended, attend(q, k, v), truth)


# ---- arguments -------------------------------------------------------------------------------------------------------

X = draw(8, 3, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: functional.attention(X, X[:7], X, CU_SEQLENS, 5),
            r"q, k and v have shapes \(8, 3, 7\), \(7, 3, 7\) and \(8, 3, 7\)",
        ),
        (lambda: functional.attention(X[0], X[0], X[0], CU_SEQLENS, 5), r"one shape \(tokens, heads, head_size\)"),
        (lambda: functional.attention(X, X.double(), X, CU_SEQLENS, 5), "torch.float64 on cpu .* one dtype"),
        (lambda: functional.attention(X, X, X.to("meta"), CU_SEQLENS, 5), "torch.float32 on meta; one dtype"),
        (lambda: functional.attention(X, X, X, CU_SEQLENS, 5, dropout_p=1.0), r"dropout_p is 1.0; .* \[0, 1\)"),
        (lambda: functional.attention(X, X, X, CU_SEQLENS, 5, dropout_p=-0.1), r"dropout_p is -0.1"),
        (lambda: functional.attention(X, X, X, CU_SEQLENS[:2], 5), "cu_seqlens ends with 5 and q holds 8 tokens"),
        (
            lambda: functional.attention(X, X, X, CU_SEQLENS, 5, tiles=TILES[:1]),
            "the sequences hold 5 tokens and the activations 8",
        ),
        (
            lambda: functional.layer_norm(X, draw(6), draw(7)),
            r"weight and bias have shapes \(6,\) and \(7,\); \(7,\) is needed",
        ),
        (lambda: functional.layer_norm(X, draw(7), draw(1)), r"shapes \(7,\) and \(1,\)"),
        (
            lambda: functional.layer_norm(X, draw(7), draw(7), residual=X[:1]),
            r"residual has shape \(1, 3, 7\) and x \(8, 3, 7\)",
        ),
        (lambda: functional.gelu(X, draw(8)), r"bias has shape \(8,\); \(7,\) is needed"),
        (lambda: functional.gelu(X, approximate="erf"), "approximate is 'erf'; it must be 'none' or 'tanh'"),
        (lambda: functional.pad(X[:2], torch.tensor([1, 1]), 3), r"indices\[1\] is 1, as is indices\[0\]"),
        (lambda: functional.pad(X[:2], torch.tensor([1, 3]), 3), r"indices\[1\] is 3; it must lie in \[0, 3\)"),
        (lambda: functional.pad(X[:2], torch.tensor([1, -1]), 3), r"indices\[1\] is -1"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 2, 5), (3, 0), (0, 7)], ids=str)
def test_pad(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = draw(*shape).to(dtype)
    indices = torch.tensor([4, 0, 3])[: shape[0]]
    out = functional.pad(x, indices, 6)
    assert out.shape == (6, *shape[1:])
    assert out.dtype == dtype
    assert torch.equal(out[indices], x)
    rest = torch.ones(6, dtype=torch.bool)
    rest[indices] = False
    assert not out[rest].any()


def test_pad_passes_gradients_back() -> None:
    x = leaf(3, 7)
    indices = torch.tensor([4, 0, 3])
    grad_out = draw(6, 7, seed=1)
    (grad,) = torch.autograd.grad(functional.pad(x, indices, 6), x, grad_out)
    assert torch.equal(grad, grad_out[indices])


def test_pad_of_a_strided_tensor() -> None:
    x = draw(7, 3).t()
    assert torch.equal(functional.pad(x, torch.tensor([2, 0, 1]), 3)[torch.tensor([2, 0, 1])], x)


# ---- threads and instruction sets ------------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the extension is built without OpenMP")
@pytest.mark.parametrize("imports", ["torch, bert_fast", "bert_fast"])
def test_one_openmp_library_is_mapped(imports: str) -> None:
    """Two thread pools on the same cores are slower than one."""
    code = f"import {imports}; import bert_fast.ops; print(open('/proc/self/maps').read())"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    paths = {line.split()[-1] for line in result.stdout.splitlines() if "/" in line}
    libraries = {path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))}
    assert len(libraries) == 1, libraries
    assert bert_fast._C.has_openmp()


def instruction_set(name: str) -> str:
    """That of a process under BERT_FAST_ISA=name; skips where the machine lacks it."""
    result = run_python("from bert_fast import _C; print(_C.instruction_set())", BERT_FAST_ISA=name)
    if "this machine has" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# The large shapes, the whole curve and the extremes: what another width of the vectors can break.
OF_OPERATORS = "cpp and (large or curve or extremes or 8192)"

# The answers of the engine, and their bits with 1, 2 and 4 threads.
OF_ENGINE = "engine_hidden or engine_whatever or engine_rows or int8_twin or int8_exact or int8_whatever"

WIDE_TESTS = f"({OF_OPERATORS}) or {OF_ENGINE}"


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_kernels_of_every_instruction_set(name: str) -> None:
    """C++ tests again, in a process that is told which one to take. The best one runs in this process."""
    if name == bert_fast._C.instruction_set():
        pytest.skip(f"{name} runs in this process")
    assert instruction_set(name) == name
    tests = [str(ROOT / "tests" / f"test_{op}.py") for op in ("attention", "layer_norm", "gelu", "engine", "int8")]
    run_tests(WIDE_TESTS, tests, BERT_FAST_ISA=name)


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_int8_without_vnni(name: str) -> None:
    assert instruction_set(name) == name
    run_tests("int8_twin or int8_exact", [str(ROOT / "tests/test_int8.py")], BERT_FAST_ISA=name, BERT_FAST_VNNI="off")


def run_tests(wanted: str, files: list[str], **environment: str) -> None:
    """In a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, *files],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


def test_unknown_instruction_sets_are_refused() -> None:
    code = """
import torch
from bert_fast import functional
try:
    functional.gelu(torch.zeros(1, 1))
except ValueError as error:
    print(error)
"""
    result = run_python(code, BERT_FAST_ISA="avx1024")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('BERT_FAST_ISA is "avx1024"; this machine has ')
    assert result.stdout.strip().endswith("portable")


def test_granted_ulps_are_few() -> None:
    """float64 is the oracle's own precision; in the others nobody widens the tolerance to pass."""
    assert {dtype: ulps for dtype, ulps in GRANTED_ULPS.items() if dtype != torch.float64} == {
        torch.float32: 4, torch.float16: 1, torch.bfloat16: 1,
    }  # fmt: skip

"""Optimizers: LAMB against its formula in float64, AdamW's kernel, groups, checkpoints, sharded parameters."""

from __future__ import annotations

import copy
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bert_fast
from bert_fast.pretraining.optimizers import Lamb, build, parameter_groups

OPTIONS: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
SHAPES = ((5, 7), (11,), (3, 2, 13), ())
CONFIG = bert_fast.BertConfig(
    vocab_size=31,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=17,
    max_position_embeddings=19,
)


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = [-0.7 + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(value.to(dtype)) for value in [*values, torch.zeros(3, 5)]]


def set_gradients(parameters: list[nn.Parameter], number: int) -> list[Tensor | None]:
    """Other gradients at each step; the second parameter has none at every third, the last one's are 0 at first."""
    generator = torch.Generator().manual_seed(100 + number)
    gradients: list[Tensor | None] = []
    for index, parameter in enumerate(parameters):
        values = 10.0 ** (index - 2) * (0.2 + torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if index == len(parameters) - 1 and number < 4:
            values = torch.zeros_like(values)
        parameter.grad = None if index == 1 and number % 3 == 2 else values.to(parameter.dtype)
        gradients.append(None if parameter.grad is None else parameter.grad.double())
    return gradients


class FormulaOfLamb:
    """You et al. 2020, algorithm 2, one parameter after the other."""

    def __init__(self, w: Tensor, *, lr: float, betas: tuple[float, float], eps: float, decay: float, adapt: bool):
        self.w, self.lr, self.betas, self.eps, self.decay, self.adapt = w, lr, betas, eps, decay, adapt
        self.m, self.v, self.t = torch.zeros_like(w), torch.zeros_like(w), 0

    def step(self, g: Tensor) -> None:
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        r = (self.m / (1 - beta1**self.t)) / ((self.v / (1 - beta2**self.t)).sqrt() + self.eps)
        u = r + self.decay * self.w
        length, size = math.sqrt(float((self.w**2).sum())), math.sqrt(float((u**2).sum()))
        ratio = length / size if self.adapt and length > 0 and size > 0 else 1.0
        self.w = self.w - self.lr * ratio * u


# ---- LAMB ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt_all", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_lamb_is_its_formula(dtype: torch.dtype, tolerance: float, decay: float, adapt_all: bool) -> None:
    ours = parameters(dtype)
    adapt = adapt_all or decay > 0
    formulas = [
        FormulaOfLamb(p.detach().double(), lr=0.02, betas=(0.8, 0.95), eps=1e-6, decay=decay, adapt=adapt) for p in ours
    ]
    optimizer = Lamb(ours, 0.02, betas=(0.8, 0.95), weight_decay=decay, adapt_all=adapt_all)
    for number in range(20):
        for formula, gradient in zip(formulas, set_gradients(ours, number), strict=True):
            if gradient is not None:
                formula.step(gradient)
        optimizer.step()
        for parameter, formula in zip(ours, formulas, strict=True):
            torch.testing.assert_close(parameter.detach().double(), formula.w, rtol=tolerance, atol=tolerance)
    assert {int(optimizer.state[p]["step"]) for p in ours} == {14, 20}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_16_bit_parameters_are_float32(dtype: torch.dtype) -> None:
    (ours,) = parameters(dtype)[:1]
    formula = FormulaOfLamb(ours.detach().double(), lr=0.02, betas=(0.9, 0.999), eps=1e-6, decay=0.1, adapt=True)
    optimizer = Lamb([ours], 0.02, weight_decay=0.1)
    for number in range(5):
        gradient = set_gradients([ours], number)[0]
        assert gradient is not None
        formula.w = ours.detach().double()  # the weights are rounded after each step, the statistics never
        formula.step(gradient)
        optimizer.step()
        torch.testing.assert_close(ours.detach(), formula.w.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
        for name, expected in (("exp_avg", formula.m), ("exp_avg_sq", formula.v)):
            assert optimizer.state[ours][name].dtype == torch.float32
            torch.testing.assert_close(optimizer.state[ours][name].double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_regression_converges(name: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(7, 3)
    x, solution = torch.randn(53, 7, generator=generator), torch.randn(7, 3, generator=generator)
    y = x @ solution - 0.4
    optimizer = build(name, model, **{**OPTIONS, "weight_decay": 1e-4})
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return float(loss.detach())

    for number in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - number / 300)
        losses.append(optimizer.step(closure))
    assert losses[0] > 1
    assert losses[-1] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_integer", [False, True])
def test_checkpoint_goes_on_the_same(dtype: torch.dtype, is_integer: bool, tmp_path: Path) -> None:
    whole = parameters(dtype)
    optimizer = Lamb(whole, 0.02)
    for number in range(4):
        set_gradients(whole, number)
        optimizer.step()
    state = optimizer.state_dict()
    assert {str(key) for entry in state["state"].values() for key in entry} == {"step", "exp_avg", "exp_avg_sq"}
    if is_integer:
        state = copy.deepcopy(state)
        for entry in state["state"].values():
            entry["step"] = int(entry["step"])
    torch.save(state, tmp_path / "state.pt")

    halves = [nn.Parameter(parameter.detach().clone()) for parameter in whole]
    resumed = Lamb(halves, 0.5, betas=(0.1, 0.2))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for number in range(4, 9):
        for side, stepped in ((whole, optimizer), (halves, resumed)):
            set_gradients(side, number)
            stepped.step()
    for one, other in zip(whole, halves, strict=True):
        assert torch.equal(one, other)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[one][name], resumed.state[other][name])


def test_groups_have_their_own_options() -> None:
    first, second = parameters(torch.float64)[:2]
    optimizer = Lamb([{"params": [first], "lr": 0.0}], 0.02)
    optimizer.add_param_group({"params": [second], "weight_decay": 0.0})
    before = [first.detach().clone(), second.detach().clone()]
    set_gradients([first, second], 4)
    optimizer.step()
    assert torch.equal(first, before[0])
    # Adam's first step has the size of the learning rate wherever the gradient is not 0
    torch.testing.assert_close((second - before[1]).abs(), torch.full_like(second, 0.02), rtol=1e-3, atol=0)


def test_odd_parameters_are_refused() -> None:
    (weight,) = parameters(torch.float32)[:1]
    optimizer = Lamb([weight])
    with pytest.raises(ValueError, match=r"a parameter has dtype torch\.complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    sparse, before = Lamb(table.parameters()), table.weight.detach().clone()
    with pytest.raises(ValueError, match="a gradient is sparse"):
        sparse.step()
    assert torch.equal(table.weight, before)


# ---- sharded parameters ----------------------------------------------------------------------------------------------


def train_sharded(rank: int, store: str, answers: Any) -> None:
    """Some steps with row-sharded parameters in one of two processes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    plain = parameters(torch.float32)[:3]
    sharded = [nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])) for parameter in plain]
    optimizer = Lamb(sharded, 0.02, adapt_all=True)
    for number in range(5):
        set_gradients(plain, number)
        for parameter, other in zip(sharded, plain, strict=True):
            parameter.grad = None if other.grad is None else distribute_tensor(other.grad, mesh, [Shard(0)])
        optimizer.step()
    whole = [parameter.full_tensor().detach().numpy() for parameter in sharded]  # type: ignore[attr-defined]
    if rank == 0:
        answers.put(whole)
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_parameters(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=train_sharded, args=(i, str(tmp_path / "store"), answers)) for i in range(2)]
    for process in processes:
        process.start()
    found = answers.get(timeout=60)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    plain = parameters(torch.float32)[:3]
    optimizer = Lamb(plain, 0.02, adapt_all=True)
    for number in range(5):
        set_gradients(plain, number)
        optimizer.step()
    for values, parameter in zip(found, plain, strict=True):
        torch.testing.assert_close(torch.from_numpy(values), parameter.detach(), rtol=1e-6, atol=1e-6)


# ---- groups and choice -----------------------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay() -> None:
    model = bert_fast.BertForPreTraining(CONFIG)
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" not in names[id(p)].lower() and names[id(p)].endswith("weight") for p in decayed["params"])
    assert all("norm" in names[id(p)].lower() or names[id(p)].endswith("bias") for p in others["params"])
    listed = [id(parameter) for group in (decayed, others) for parameter in group["params"]]
    assert sorted(listed) == sorted(names)


def test_shared_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1, 1]
    model[0].weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert (group["weight_decay"], len(group["params"])) == (0.0, 1)
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="model has no trainable parameter"):
        parameter_groups(model, 0.1)


def test_adamw_is_fused_where_torch_can() -> None:
    model = nn.Linear(3, 5)
    optimizer = build("adamw", model, **OPTIONS)
    assert type(optimizer) is torch.optim.AdamW
    assert [(g["fused"], g["weight_decay"], g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups] == [
        (True, 0.1, 0.01, (0.8, 0.95), 1e-6),
        (True, 0.0, 0.01, (0.8, 0.95), 1e-6),
    ]
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(parameter_groups(twin, 0.1), lr=0.01, betas=(0.8, 0.95), eps=1e-6, foreach=False)
    for number in range(3):
        for side, stepped in ((model, optimizer), (twin, plain)):
            set_gradients(list(side.parameters()), number)
            stepped.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


def test_adamw_without_a_fused_kernel() -> None:
    optimizer = build("adamw", nn.Linear(3, 5, device="meta"), **OPTIONS)
    assert [group["fused"] for group in optimizer.param_groups] == [None, None]


def test_lamb_is_built() -> None:
    optimizer = build("lamb", nn.Linear(3, 5), **OPTIONS)
    assert type(optimizer) is Lamb
    assert [(g["weight_decay"], g["lr"], g["betas"], g["eps"], g["adapt_all"]) for g in optimizer.param_groups] == [
        (0.1, 0.01, (0.8, 0.95), 1e-6, False),
        (0.0, 0.01, (0.8, 0.95), 1e-6, False),
    ]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be a finite number of at least 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"eps": 0.0}, "eps is 0.0; it must be a finite number above 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\)"),
    ],
)
def test_refusals(name: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, nn.Linear(3, 5), **{**OPTIONS, **values})


def test_unknown_optimizer() -> None:
    name: Any = "sgd"
    with pytest.raises(ValueError, match="name is 'sgd'; it must be 'adamw' or 'lamb'"):
        build(name, nn.Linear(3, 5), **OPTIONS)
    with pytest.raises(ValueError, match="lr is -1; it must be a finite number of at least 0"):
        Lamb(nn.Linear(3, 5).parameters(), lr=-1)

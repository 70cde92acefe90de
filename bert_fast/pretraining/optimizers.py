"""AdamW and LAMB for BERT, and the parameters that weight decay leaves alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

__all__ = ["Lamb", "build", "parameter_groups"]

# Where AdamW has one kernel for everything, from torch 2.6 on.
FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices decay; biases and LayerNorm's weights do not.

    As in BERT's released code, except that the number of dimensions decides, not the name. Wrappers that flatten
    parameters hide it: make the groups before. fully_shard leaves the dimensions as they are.

    Args:
        model: a parameter that it uses in several places is listed once.
        weight_decay: of the matrices, at least 0.

    Returns:
        Groups for a torch optimizer; none is empty.

    Raises:
        ValueError: no trainable parameter, or a negative weight_decay.
    """
    _check_at_least_0("weight_decay", weight_decay)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model has no trainable parameter; at least one is needed")
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(
    name: Literal["adamw", "lamb"],
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """The optimizer of a model, with the groups of parameter_groups.

    Args:
        name: "adamw" (Loshchilov and Hutter 2019), fused where torch can; "lamb" (You et al. 2020).
        model: whose parameters it changes.
        learning_rate, weight_decay: at least 0.
        betas: decay rates of the two moments, in [0, 1).
        eps: above 0.

    Raises:
        ValueError: another name, an option out of its range, no trainable parameter.
    """
    if name not in ("adamw", "lamb"):
        raise ValueError(f"name is {name!r}; it must be 'adamw' or 'lamb'")
    groups = parameter_groups(model, weight_decay)
    _check_options({"learning_rate": learning_rate, "betas": betas, "eps": eps})
    if name == "lamb":
        return Lamb(groups, lr=learning_rate, betas=betas, eps=eps)
    is_fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True if is_fused else None)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2), with Adam's bias correction as in the authors' released code.

    With m and v the corrected means of the gradient and its square, a parameter w of weight decay d moves by
    -lr * ratio * u, where u = m / (sqrt(v) + eps) + d * w and ratio = |w| / |u|, or 1 where a norm is 0.
    The gradient is not clipped in here. The moments are float32 or wider; 16-bit parameters have no wider copy.
    DTensor parameters, as fully_shard makes them, get the norms of the whole parameter.

    Args:
        params: parameters or groups of them, real and dense.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, in [0, 1).
        eps: above 0.
        weight_decay: at least 0.
        adapt_all: whether parameters without weight decay have a trust ratio too.

    Raises:
        ValueError: an option out of its range, a complex parameter, a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt_all: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt_all": adapt_all}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"a parameter has dtype {parameter.dtype}; a real floating-point dtype is needed")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            # torch has cast the moments to the parameter's dtype.
            if parameter.dtype != _wide(parameter.dtype) and number in state_dict["state"]:
                for name in ("exp_avg", "exp_avg_sq"):
                    saved = state_dict["state"][number][name]
                    self.state[parameter][name] = saved.to(parameter.device, _wide(parameter.dtype), copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if any(parameter.grad.layout != torch.strided for parameter in parameters):
                raise ValueError("a gradient is sparse; Lamb needs dense gradients")
            buckets: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in parameters:
                number = self._count(parameter)
                buckets[parameter.device, parameter.dtype, number].append(parameter)
            for (_, _, number), bucket in buckets.items():
                self._update(bucket, group, number)
        return loss

    def _count(self, parameter: Tensor) -> int:
        """The number of the parameter's step, from 1 on; the first makes its state."""
        state = self.state[parameter]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=_wide(parameter.dtype))
        number = int(state.get("step", 0)) + 1
        state["step"] = torch.tensor(float(number), dtype=torch.float32, device="cpu")
        return number

    def _update(self, parameters: list[Tensor], group: dict[str, Any], number: int) -> None:
        """The step with this number for parameters of one device and dtype."""
        beta1, beta2 = group["betas"]
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        wide = _wide(parameters[0].dtype)
        gradients = [parameter.grad.to(wide) for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        del gradients

        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1 - beta2**number))
        torch._foreach_add_(roots, group["eps"])
        updates = list(torch._foreach_div(means, roots))
        del roots
        torch._foreach_div_(updates, 1 - beta1**number)
        weights = [parameter.to(wide) for parameter in parameters]
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["weight_decay"] != 0 or group["adapt_all"]:
            torch._foreach_mul_(updates, _trust_ratios(weights, updates))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def _trust_ratios(weights: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """|w| / |u| of each parameter, 1 where a norm is 0; nothing waits for the device."""
    lengths = torch.stack(list(torch._foreach_norm(weights)))
    sizes = torch.stack(list(torch._foreach_norm(updates)))
    ratios = torch.where((lengths > 0) & (sizes > 0), lengths / sizes, torch.ones_like(lengths))
    return list(ratios.unbind())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_at_least_0(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number of at least 0")


def _check_options(options: dict[str, Any]) -> None:
    for name in ("learning_rate", "lr", "weight_decay"):
        if name in options:
            _check_at_least_0(name, options[name])
    if not 0 < options["eps"] < math.inf:  # 0 would make an update of 0 / 0 where a gradient is 0
        raise ValueError(f"eps is {options['eps']}; it must be a finite number above 0")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}; it must be two numbers in [0, 1)")

"""bert_fast.guard: every change of a model's structure is noticed, and nothing else is."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bert_fast import _C
from bert_fast.guard import UNREAD, Kept, watch


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.dropout = nn.Dropout(0.25)
        self.norm = nn.LayerNorm(5)
        self.size = 7
        self.register_buffer("table", torch.arange(3.0))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inner(), Inner()])
        self.last = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.setting = ("a", 1)


class OtherLinear(nn.Linear):
    """Another type, the same layout."""


def hook(*_: object) -> None: ...


def replaced(container: str, name: str, value: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(container), name, value())


CHANGES: dict[str, Callable[[Any], object]] = {
    "type": lambda model: setattr(model.last, "__class__", OtherLinear),
    "type, deep": lambda model: setattr(model.layers[1].linear, "__class__", OtherLinear),
    "attribute": replaced("layers.1", "size", lambda: 8),
    "attribute of the root": replaced("", "setting", lambda: ("a", 2)),
    "attribute added": replaced("layers.0", "extra", lambda: 1),
    "attribute removed": lambda model: delattr(model.layers[0], "size"),
    "attribute of the root removed": lambda model: delattr(model, "setting"),
    "forward on the instance": replaced("layers.0.linear", "forward", lambda: hook),
    "dropout's p": replaced("layers.1.dropout", "p", lambda: 0.5),
    "norm's eps": replaced("layers.1.norm", "eps", lambda: 0.5),
    "training": lambda model: model.eval(),
    "training of one": lambda model: model.layers[1].dropout.eval(),
    "training of the root": lambda model: setattr(model, "training", False),
    "parameter": replaced("last", "weight", lambda: nn.Parameter(torch.zeros(2, 5))),
    "parameter of the root": replaced("", "scale", lambda: nn.Parameter(torch.ones(2))),
    "parameter removed": replaced("last", "bias", lambda: None),
    "parameter added": lambda model: model.layers[0].register_parameter("more", nn.Parameter(torch.ones(1))),
    "parameter added to the root": lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1))),
    "buffer": replaced("layers.0", "table", lambda: torch.arange(3.0)),
    "buffer added": lambda model: model.last.register_buffer("more", torch.ones(1)),
    "module": replaced("layers.0", "linear", lambda: nn.Linear(3, 5)),
    "module of the root": replaced("", "last", lambda: nn.Linear(5, 2)),
    "module added": lambda model: model.layers[0].add_module("more", nn.Identity()),
    "module added to the root": lambda model: model.add_module("more", nn.Identity()),
    "module removed": lambda model: delattr(model.layers[0], "norm"),
    "layer added": lambda model: model.layers.append(Inner()),
    "layer removed": lambda model: model.layers.__delitem__(0),
    "layer replaced": lambda model: model.layers.__setitem__(1, Inner()),
    "layers exchanged": replaced("", "layers", lambda: nn.ModuleList([Inner(), Inner()])),
}

HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name: str) -> None:
    model = Outer()
    guard = watch(model)
    assert guard.holds()
    CHANGES[name](model)
    assert not guard.holds()
    assert watch(model).holds()


@pytest.mark.parametrize("where", ["", "last", "layers", "layers.0", "layers.1.dropout"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_noticed(kind: str, where: str) -> None:
    model = Outer()
    register = getattr(model.get_submodule(where), f"register_{kind}")
    without = watch(model)
    handle = register(hook)
    assert not without.holds()
    with_hook = watch(model)
    handle.remove()
    assert not with_hook.holds()
    second = register(hook)  # as many as before, under another key
    assert not with_hook.holds()
    second.remove()
    assert watch(model).holds()


def test_exchanged_hooks_are_noticed() -> None:
    model = Outer()
    model.last.register_forward_hook(hook)
    guard = watch(model)
    (key,) = model.last._forward_hooks
    model.last._forward_hooks[key] = print
    assert not guard.holds()


def test_exchanged_modules_are_noticed() -> None:
    model = Outer()
    guard = watch(model)
    one, other = model.layers[0], model.layers[1]
    model.layers[0], model.layers[1] = other, one
    assert not guard.holds()
    model.layers[0], model.layers[1] = one, other
    assert guard.holds()


def test_what_no_forward_pass_reads() -> None:
    model = Outer()
    guard = watch(model)
    model.scale.data.mul_(2)
    with torch.no_grad():
        model.last.weight.add_(1)
    model.load_state_dict(Outer().state_dict())
    model.last.weight.requires_grad_(False)
    model.last.weight.grad = torch.ones(2, 5)
    model.__dict__["added_to_the_root"] = 1
    model.train()
    assert guard.holds()
    model.__dict__["bert_fast_calls"] = {}
    with_calls = watch(model)
    model.__dict__["bert_fast_calls"] = {"fast": 1}
    assert with_calls.holds()


def test_unread_entries_exist() -> None:
    """A name that torch has given up would leave the new one watched, or unwatched."""
    assert set(vars(nn.Linear(1, 1))) >= UNREAD - {"bert_fast_calls"}


def test_guard_of_nothing() -> None:
    assert _C.Guard().holds()


@pytest.mark.parametrize("name", ["missing", 3, None])
def test_items_must_be_there(name: Any) -> None:
    with pytest.raises(KeyError):
        _C.Guard().expect_item({"here": 1}, name)


def test_items_are_compared_by_identity() -> None:
    first, equal = [1], [1]
    entries = {"key": first}
    guard = _C.Guard()
    guard.expect_item(entries, "key")
    entries["key"] = equal
    assert not guard.holds()
    entries["key"] = first
    assert guard.holds()
    del entries["key"]
    assert not guard.holds()


# ---- Kept ------------------------------------------------------------------------------------------------------------


class Maker:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def test_kept_until_something_changes() -> None:
    model, kept, make = Outer(), Kept[int](), Maker()
    assert [kept.get(model, make) for _ in range(3)] == [1, 1, 1]
    model.eval()
    assert [kept.get(model, make) for _ in range(2)] == [2, 2]
    model.last.register_forward_hook(hook).remove()
    assert kept.get(model, make) == 2
    kept.forget(model)
    assert kept.get(model, make) == 3
    kept.forget(Outer())


def test_kept_by_the_type_of_the_root() -> None:
    class OtherOuter(Outer): ...

    model, kept, make = Outer(), Kept[int](), Maker()
    assert kept.get(model, make) == 1
    model.__class__ = OtherOuter
    assert kept.get(model, make) == 2


def test_kept_for_each_model() -> None:
    model, kept, make = Outer(), Kept[int](), Maker()
    twin = copy.deepcopy(model)
    assert [kept.get(each, make) for each in (model, twin, model, twin)] == [1, 2, 1, 2]


@pytest.mark.parametrize("is_known", [False, True])
def test_what_make_raises_is_passed_on(is_known: bool) -> None:
    model, kept, make = Outer(), Kept[int](), Maker()
    if is_known:
        kept.get(model, make)
        model.eval()

    def fail() -> int:
        raise LookupError("reason")

    for _ in range(2):
        with pytest.raises(LookupError, match="reason"):
            kept.get(model, fail)
    assert kept.get(model, make) == make.count


def test_kept_forgets_with_its_module() -> None:
    class Value: ...

    model, kept = Outer(), Kept[Value]()
    value = weakref.ref(kept.get(model, Value))
    gone: list[weakref.ref[Any]] = [value, weakref.ref(model), weakref.ref(model.last)]
    assert None not in [each() for each in gone]
    del model
    gc.collect()
    assert [each() for each in gone] == [None] * 3

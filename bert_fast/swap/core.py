"""swap and restore: an instance's class gives way to a subclass that differs in `forward` alone.

The subclass keeps the class's name and module, so that configurations, registries and checkpoints written by the model
name the class that everyone has. No module, parameter or buffer is touched.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .. import engine
from ..graphs import GraphRunner
from ..masking import PackedBatch
from . import pooling
from .bert import FAMILY as BERT
from .calls import check_bounds, without_batch
from .distilbert import DISTILBERT
from .electra import ELECTRA
from .family import Family, PackedRead, Rounding, kept_rows
from .modernbert import MODERNBERT
from .mpnet import MPNET
from .roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from .token_heads import flattened_forward, packed_forward
from .torch_encoder import TRANSFORMER_ENCODER, TRANSFORMER_ENCODER_LAYER

FAMILIES: tuple[Family, ...] = (
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    CAMEMBERT,
    DISTILBERT,
    ELECTRA,
    MPNET,
    MODERNBERT,
    TRANSFORMER_ENCODER,
    TRANSFORMER_ENCODER_LAYER,
)

Model = TypeVar("Model", bound=nn.Module)

FAST = "fast"

# A warning is attributed to the line that called the model, past these packages.
FRAMEWORKS = frozenset({"accelerate", "bert_fast", "sentence_transformers", "torch", "transformers"})


class Swapped:
    """Marks a swapped class. The attributes belong to the class, but for those of an encoder's instance:
    the family is None where the class only reads an encoder,
    `bert_fast_calls` counts paths, `bert_fast_graphs` holds CUDA graphs if those are wanted, `bert_fast_rounding` says
    in how few bits the CPU engine is to multiply, and is None where that is the model's own affair."""

    bert_fast_family: Family | None
    bert_fast_base: type[nn.Module]
    bert_fast_calls: Counter[str]
    bert_fast_graphs: GraphRunner
    bert_fast_rounding: Rounding | None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy rebuild it from the class that can be imported.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (self.bert_fast_base,), state


def _rebuild(base: type[nn.Module]) -> nn.Module:
    make = _class_maker(base)
    cls = base if make is None else make()
    return cls.__new__(cls)


def bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)[1:]


def _fitting(forward: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    """Tells whether a call's arguments are the forward's own, each given once and none missing."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = argument_names(forward)
    has_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    known = {p.name for p in parameters}

    def fits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = names[: len(args)]
        if len(args) > len(names) or any(name in given or not (has_more or name in known) for name in kwargs):
            return False
        return all(name in given or name in kwargs for name in needed)

    return fits


def _make_class(base: Any, family: Family | None, forward: Callable[..., Any]) -> type[nn.Module]:
    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": functools.wraps(base.forward)(forward),
        "bert_fast_family": family,
        "bert_fast_base": base,
        "__reduce_ex__": Swapped.__reduce_ex__,
    }
    # In this order an instance has the same layout in all classes, without which none could take another's place.
    cls: type[nn.Module] = type(base.__name__, (base, Swapped), attributes)
    return cls


@functools.cache
def _pooling_class(base: Any) -> type[nn.Module]:
    return _make_class(base, None, pooling.forward)


@functools.cache
def _encoder_class(base: Any, family: Family) -> type[nn.Module]:
    names, fits = argument_names(base.forward), _fitting(base.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = bind(names, args, kwargs)
        if isinstance(call.get("input_ids"), PackedBatch):
            args, kwargs = (), without_batch(call, uses_columns=family.uses_columns)
            call = kwargs
        if not fits(args, kwargs):  # the original's own error says what is wrong
            return base.forward(self, *args, **kwargs)
        read = kept_rows.get()
        plan = read.plan if isinstance(read, PackedRead) and read.encoder is self else family.plan(self, call)
        if isinstance(plan, str):
            check_bounds(self, call, plan)
            count(self, plan)
            return base.forward(self, *args, **kwargs)
        count(self, FAST)
        return family.run(self, call, plan)

    return _make_class(base, family, forward)


@functools.cache
def _head_class(base: Any, family: Family, name: str) -> type[nn.Module]:
    names, fits = argument_names(base.forward), _fitting(base.forward)
    rows_of, token_head = family.kept_rows[name], family.token_heads.get(name)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = bind(names, args, kwargs)
        if isinstance(call.get("input_ids"), PackedBatch):
            args, kwargs = (), without_batch(call, uses_columns=family.uses_columns)
            call = kwargs
        rows = rows_of(self, call)
        if fits(args, kwargs):
            if token_head is None:
                output = flattened_forward(family, self, call, base.forward, rows)
            else:
                output = packed_forward(family, token_head, self, call, base.forward, rows)
            if output is not None:
                return output
        return kept_rows.call(rows, base.forward, self, *args, **kwargs)

    return _make_class(base, family, forward)


def count(model: nn.Module, path: str) -> None:
    """Notes which path a call took; says so the first time that it is not the fast one. Compiled calls go uncounted."""
    message = f"bert_fast: {type(model).__name__} takes its original path: {path}"
    if torch.compiler.is_compiling():  # a number that changes at every call would be compiled anew at every call
        if path != FAST:
            warnings.warn(message, stacklevel=2)
        return
    calls: Counter[str] | None = model.__dict__.get("bert_fast_calls")
    if calls is None:
        calls = Counter()
        object.__setattr__(model, "bert_fast_calls", calls)
    calls[path] += 1
    if path != FAST and calls[path] == 1:
        warnings.warn(message, stacklevel=_callers_level())


def _callers_level() -> int:
    """The stack level of the line outside the frameworks that called the model."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in FRAMEWORKS:
        level, frame = level + 1, frame.f_back
    return max(level - 1, 1)


def _class_maker(base: Any) -> Callable[[], type[nn.Module]] | None:
    """How to make the swapped class of an encoder, a head or a pooling that is known, or None.

    A subclass counts as long as it keeps the steps that the family replaces.
    """
    if pooling.is_pooling(base):
        return functools.partial(_pooling_class, base)
    for family in FAMILIES:
        module = sys.modules.get(family.module)
        if module is None:  # nobody has imported the family, so no model is of it
            continue
        encoder = getattr(module, family.encoder)
        if issubclass(base, encoder) and all(
            getattr(base, step, None) is getattr(encoder, step, None) for step in family.steps
        ):
            return functools.partial(_encoder_class, base, family)
        for name in family.kept_rows:
            head = getattr(module, name, None)
            if head is not None and issubclass(base, head) and base.forward is head.forward:
                return functools.partial(_head_class, base, family, name)
    return None


def _is_encoder_class(cls: Any) -> bool:
    """Whether it is the swapped class of an encoder, not of what reads one."""
    if not issubclass(cls, Swapped) or cls.bert_fast_family is None:
        return False
    return cls.bert_fast_family.encoder in {base.__name__ for base in cls.__mro__}


def swapped_encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every swapped encoder in the model."""
    return ((name, module) for name, module in model.named_modules() if _is_encoder_class(type(module)))


def is_off() -> bool:
    """Whether BERT_FAST=off stands in the environment."""
    return os.environ.get("BERT_FAST", "").lower() == "off"


def swap(
    model: Model,
    *,
    cuda_graphs: bool = False,
    int8: bool = False,
    int8_exact: Sequence[str] = (),
    bf16: bool = False,
) -> Model:
    """Gives every known encoder in the model the fast forward, in place. Once swapped, a model stays as it is.

    Parameters, their names, hooks, the training mode and the class's name stay; calls that the fast path does not serve
    take the original one, with a warning that names the reason.

    Args:
        model: a transformers model, a SentenceTransformer, or any module that holds one.
        cuda_graphs: whether, on a GPU and without gradients, batches of up to graphs.MAX_TOKENS tokens are replayed
            from CUDA graphs, which are kept for buckets of token counts. Calls at the same time, from other threads or
            on other streams, need a model each. swap(model, cuda_graphs=False) on a swapped model ends it.
        int8: whether, on a CPU and without gradients, the encoder's linear layers multiply in 8 bits: weights with a
            scale for each output, activations with a scale for each token and 384 features, found as they come.
            Attention, LayerNorm and sums stay in float32, and so do the parameters: saving and training see nothing of
            it. `verify` then checks what it costs in accuracy. swap(model, int8=False) on a swapped model ends it.
        int8_exact: names of modules, as in model.named_modules(), whose linear layers multiply in float32 all the same.
        bf16: the same in bfloat16, with AVX512-BF16; elsewhere it would be slower, and the products stay in float32, as
            `report` says. A model whose parameters are in bfloat16 needs no asking. swap(model, bf16=False) ends it.

    Returns:
        The same object.

    Raises:
        TypeError: not a module.
        ValueError: nothing in it is known, and the message lists what is; int8_exact names a module that no encoder
            has; or both int8 and bf16 are asked for.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; a torch.nn.Module is needed")
    _check_options(int8, int8_exact, bf16)
    if is_off():
        warnings.warn("BERT_FAST=off is set: bert_fast.swap leaves the model as it is", stacklevel=2)
        return model
    classes = _swapped_classes(model)
    if not any(_is_encoder_class(cls) for _, cls in classes) and next(swapped_encoders(model), None) is None:
        known = ", ".join(f"{family.name} ({family.module}.{family.encoder})" for family in FAMILIES)
        raise ValueError(f"{type(model).__name__} holds no encoder that bert_fast knows; it knows {known}")
    exact = _exact_names(model, [*swapped_encoders(model), *_named(model, classes)], int8_exact)
    for module, cls in classes:
        module.__class__ = cls
    for name, encoder in swapped_encoders(model):
        rounding = Rounding("int8", exact.get(name, ())) if int8 else Rounding("bfloat16") if bf16 else None
        encoder.__dict__["bert_fast_rounding"] = rounding
        if cuda_graphs and "bert_fast_graphs" not in encoder.__dict__:
            object.__setattr__(encoder, "bert_fast_graphs", GraphRunner())
        elif not cuda_graphs:
            encoder.__dict__.pop("bert_fast_graphs", None)
    for encoder, reader in pooling.readers(model):
        if _is_encoder_class(type(encoder)) and issubclass(reader, Swapped):
            encoder.__dict__["bert_fast_pooled"] = True
    return model


def knows(model: nn.Module) -> bool:
    """Whether there is an encoder in the model that swap would swap, or has swapped."""
    if next(swapped_encoders(model), None) is not None:
        return True
    return any(_is_encoder_class(cls) for _, cls in _swapped_classes(model))


def _check_options(int8: bool, int8_exact: Sequence[str], bf16: bool) -> None:
    if int8 and bf16:
        raise ValueError("int8 and bf16 are both True; at most one is allowed")
    if int8_exact and not int8:
        raise ValueError(f"int8_exact is {int8_exact!r}, but int8 is not True, so that every product is exact already")


def _swapped_classes(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """What is not swapped yet, with its class to be; not what lies within an encoder, which steps over it."""
    makers = []
    within: set[nn.Module] = set()
    for module in model.modules():
        if module in within:
            continue
        make = None if isinstance(module, Swapped) else _class_maker(type(module))
        if make is not None:
            makers.append((module, make))
        if _is_encoder_class(type(module)) or (make is not None and _is_encoder_class(make())):
            within.update(module.modules())
    for module, _ in makers:
        if "forward" in module.__dict__:
            raise ValueError(
                f"{type(module).__name__} has a forward of its own on the instance ({module.__dict__['forward']!r}); "
                "swap the model before anything wraps it"
            )
    return [(module, make()) for module, make in makers]


def _named(model: nn.Module, classes: list[tuple[nn.Module, type[nn.Module]]]) -> Iterator[tuple[str, nn.Module]]:
    """The encoders among modules that are about to be swapped."""
    encoders = {module for module, cls in classes if _is_encoder_class(cls)}
    return ((name, module) for name, module in model.named_modules() if module in encoders)


def _exact_names(
    model: nn.Module, encoders: list[tuple[str, nn.Module]], wanted: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """For each encoder the names, within it, of the modules that are to multiply in float32."""
    if isinstance(wanted, str):
        raise ValueError(f"int8_exact is the string {wanted!r}; a sequence of names is needed")
    modules = dict(model.named_modules())
    result: dict[str, tuple[str, ...]] = {}
    for name in wanted:
        owners = [
            (encoder_name, inner)
            for encoder_name, encoder in encoders
            for inner, module in encoder.named_modules()
            if module is modules.get(name)
        ]
        if not owners:
            known = ", ".join(repr(encoder_name) for encoder_name, _ in encoders)
            raise ValueError(f"int8_exact names {name!r}, which is no module of an encoder; the encoders are {known}")
        for encoder_name, inner in owners:
            result[encoder_name] = (*result.get(encoder_name, ()), inner)
    return result


def _unswapped_class(cls: type[Swapped]) -> Any:
    """What the class was before swap; where a framework has derived a class of its own from the swapped one, as FSDP
    does, such a class derived from that."""
    if "bert_fast_base" in cls.__dict__:
        return cls.bert_fast_base
    bases = tuple(_unswapped_class(base) if issubclass(base, Swapped) else base for base in cls.__bases__)
    attributes = {name: x for name, x in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, bases, attributes)


def restore(model: Model) -> Model:
    """Undoes swap exactly, in place; a model that is not swapped stays as it is. Returns the same object."""
    for module in model.modules():
        if isinstance(module, Swapped):
            module.__class__ = _unswapped_class(type(module))
            engine.forget(module)
            for name in ("bert_fast_calls", "bert_fast_graphs", "bert_fast_pooled", "bert_fast_rounding"):
                module.__dict__.pop(name, None)
    return model


@contextmanager
def without_rounding(model: nn.Module) -> Iterator[None]:
    """Within it no encoder multiplies in fewer bits than its parameters have."""
    wishes = {encoder: rounding_of(encoder) for _, encoder in swapped_encoders(model)}
    for encoder in wishes:
        encoder.__dict__["bert_fast_rounding"] = None
    try:
        yield
    finally:
        for encoder, rounding in wishes.items():
            encoder.__dict__["bert_fast_rounding"] = rounding


def rounding_of(encoder: nn.Module) -> Rounding | None:
    """What swap was asked to round the encoder's products to."""
    rounding: Rounding | None = encoder.__dict__.get("bert_fast_rounding")
    return rounding


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """Within it the model is as before swap."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, Swapped)]
    classes = [(module, type(module)) for module in modules]
    for module, cls in classes:
        module.__class__ = cls.bert_fast_base
    try:
        yield
    finally:
        for module, cls in classes:
            module.__class__ = cls

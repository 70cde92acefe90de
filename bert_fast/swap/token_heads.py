"""Heads that say something of each token, without padding: the original head's own forward, on packed rows.

Such heads work on each row alone, so their forward gives the same on (1, rows, hidden_size) as on a padded batch, if
the labels are packed with the rows. What it says is padded afterwards. A head that speaks of the whole vocabulary sees
the labelled rows alone; the rest of its logits is computed when somebody reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .calls import setting
from .family import FIRST_ROWS, Call, Family, PackedRead, Read, TokenHead, kept_rows
from .parts import is_listened_to

ENCODER_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
)

# Arguments that change nothing of what is said here; `num_items_in_batch` belongs to the loss.
HARMLESS = ("return_dict", "num_items_in_batch")


def packed_forward(
    family: Family, head: TokenHead, model: Any, call: Call, forward: Callable[..., Any], rows: Read
) -> Any:
    """What `forward` says of a padded batch; None: the call needs the padded rows.

    Args:
        family: of the encoder.
        head: what kind of head the model has.
        model: with a swapped encoder.
        call: the model's arguments.
        forward: of the model's own class.
        rows: what the head reads, see Family.kept_rows.
    """
    encoder = _encoder(model)
    if encoder is None or family.pack is None:
        return None
    if head.competes and call.get("cu_seq_lens_q") is not None and call.get("start_positions") is not None:
        raise ValueError(
            "start_positions and cu_seq_lens_q are both given; where answers begin is learnt from padded batches alone"
        )
    if not _is_served(head, model, call):
        return None
    read = _packed_read(family, encoder, call, rows)
    if isinstance(read, str):
        return None
    batch, labels = read.batch, _labels(head, call)
    arguments = dict(call)
    if labels is not None:
        packed_labels = batch.select(labels.reshape(batch.shape).to(batch.positions.device))
        if head.is_of_vocabulary:
            # Rows that are kept for other reasons than a label count for nothing.
            read.rows = batch.kept if batch.kept is not None else (packed_labels != -100).nonzero()[:, 0]
            packed_labels = packed_labels.index_select(0, read.rows)
        arguments["labels"] = packed_labels[None]
    output = kept_rows.call(read, forward, model, **arguments)
    if read.rows is None:
        _set(output, _padded(head, read, output))
        return output
    unlabelled = {name: value for name, value in call.items() if name not in ("labels", *head.text_labels)}
    everywhere = replace(read, rows=None)

    def compute() -> dict[str, Tensor]:
        return _padded(head, everywhere, kept_rows.call(everywhere, forward, model, **unlabelled))

    return _lazy(output, head.logits, _Later(model, compute))


def flattened_forward(family: Family, model: Any, call: Call, forward: Callable[..., Any], rows: Read) -> Any:
    """What `forward`, which reads the first row of each text, says of texts in one row; None: they are not.

    Some heads pass on to their encoder only what they know, so that it would not hear of the texts' bounds.

    Raises:
        ValueError: more than the logits is asked for, or the encoder would take the original path.
    """
    encoder = _encoder(model)
    if call.get("cu_seq_lens_q") is None or rows is not FIRST_ROWS or encoder is None or family.pack is None:
        return None
    for name in ("output_attentions", "output_hidden_states"):
        if setting(encoder, call, name):
            raise ValueError(
                f"{name} is set beside cu_seq_lens_q; of texts in one row only the encoder itself has them"
            )
    read = _packed_read(family, encoder, call, rows)
    if isinstance(read, str):
        raise ValueError(f"cu_seq_lens_q is given, but texts in one row are not served, since {read}")
    read.rows, read.is_of_texts = read.batch.first_rows, True
    return kept_rows.call(read, forward, model, **call)


def _packed_read(family: Family, encoder: Any, call: Call, rows: Read) -> PackedRead | str:
    """Of all rows of the call, or why its encoder takes the original path."""
    assert family.pack is not None
    encoder_call = {name: call[name] for name in ENCODER_ARGUMENTS if call.get(name) is not None}
    plan = kept_rows.call(rows, family.plan, encoder, encoder_call)
    if isinstance(plan, str):
        return plan
    batch, embeds = kept_rows.call(rows, family.pack, encoder, encoder_call)
    return PackedRead(encoder, plan, batch, embeds, None)


def _encoder(model: Any) -> Any:
    """The model's encoder, if nothing stands between the two."""
    encoder = model._modules.get(model.base_model_prefix)
    if encoder is None or not hasattr(type(encoder), "bert_fast_family"):
        return None
    if "forward" in encoder.__dict__ or is_listened_to(encoder) or "bert_fast_graphs" in encoder.__dict__:
        return None
    return encoder


def _is_served(head: TokenHead, model: Any, call: Call) -> bool:
    if torch.compiler.is_compiling():
        return False
    known = (*ENCODER_ARGUMENTS, *HARMLESS, "labels", *head.text_labels)
    if any(value is not None and value is not False for name, value in call.items() if name not in known):
        return False
    config = model.config
    if any(getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")):
        return False
    returns_dict = call.get("return_dict")
    if not (getattr(config, "return_dict", True) if returns_dict is None else returns_dict):
        return False
    labels = _labels(head, call)
    if labels is None:
        return True
    source = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if not (isinstance(labels, Tensor) and labels.is_contiguous() and source is not None):
        return False  # the original says what is wrong
    fits = labels.numel() == source.shape[:2].numel()
    return fits and not getattr(model, "sparse_prediction", False)


def _labels(head: TokenHead, call: Call) -> Any:
    """Those of the tokens, which are overlooked where there are none of the texts."""
    has_all = all(call.get(name) is not None for name in head.text_labels)
    return call.get("labels") if has_all else None


def _padded(head: TokenHead, read: PackedRead, output: Any) -> dict[str, Tensor]:
    """The outputs with an entry for each token, padded."""
    result = {}
    for name in head.logits:
        padded = read.batch.pad(output[name][0])
        if head.competes and read.batch.indices is not None:
            is_row = torch.zeros(padded.shape[:2].numel(), dtype=torch.bool, device=padded.device)
            is_row[read.batch.indices] = True
            padded = padded.masked_fill(~is_row.view(padded.shape[:2]), torch.finfo(padded.dtype).min)
        result[name] = padded
    return result


def _set(output: Any, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        output[name] = value


# ---- logits that are computed when they are read ---------------------------------------------------------------------


class _Later:
    """A call that is made later, in the modes of now.

    Args:
        model: whose weights must still be what they are.
        compute: the call.
    """

    def __init__(self, model: nn.Module, compute: Callable[[], dict[str, Tensor]]) -> None:
        self.compute = compute
        self.has_grad = torch.is_grad_enabled()
        self.device = next(model.parameters()).device.type
        self.autocast = (torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device))
        self.weights = [(x, x._version) for x in model.parameters() if not x.is_inference()]

    def __call__(self) -> dict[str, Tensor]:
        if any(x._version != version for x, version in self.weights):
            raise RuntimeError(
                "logits are computed when they are read, and the model's weights have changed since its forward pass; "
                "read them before the optimizer's step"
            )
        with ExitStack() as modes:
            modes.enter_context(torch.set_grad_enabled(self.has_grad))
            enabled, dtype = self.autocast
            modes.enter_context(torch.autocast(self.device, dtype=dtype, enabled=enabled))
            return self.compute()


def _lazy(output: Any, names: tuple[str, ...], later: _Later) -> Any:
    """The output, whose logits are computed when somebody reads them."""
    _set(output, {name: output[name][:, :0] for name in names})
    base: Any = type(output)
    output.__class__ = _lazy_class(base, names)
    output.__dict__["bert_fast_later"] = later
    return output


@functools.cache
def _lazy_class(base: Any, names: tuple[str, ...]) -> Any:
    """A subclass that turns back into `base` as soon as anything is asked for that may be among these names."""

    def settle(self: Any) -> None:
        values = self.__dict__["bert_fast_later"]()
        del self.__dict__["bert_fast_later"]
        self.__class__ = base
        _set(self, values)

    def reader(method: str) -> Callable[..., Any]:
        def read(self: Any, *args: Any, **kwargs: Any) -> Any:
            settle(self)
            return getattr(self, method)(*args, **kwargs)

        return read

    def get_item(self: Any, key: Any) -> Any:
        if isinstance(key, str) and key not in names:
            return base.__getattribute__(self, key) if key in self else base.__getitem__(self, key)
        settle(self)
        return self[key]

    def get(self: Any, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    methods = ("items", "values", "to_tuple", "copy", "__reduce_ex__", "__copy__", "__deepcopy__", "__eq__", "__repr__")
    attributes: dict[str, Any] = {method: reader(method) for method in methods if hasattr(base, method)}
    attributes |= {name: property(functools.partial(_settled, settle, name)) for name in names}
    attributes |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**attributes, "__getitem__": get_item, "get": get})


def _settled(settle: Callable[[Any], None], name: str, output: Any) -> Any:
    settle(output)
    return getattr(output, name)

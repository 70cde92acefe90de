"""attn_implementation="bert_fast": attention without padding for models of transformers that swap does not know.

Only attention skips the padding here; the rest of the model computes it as before.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, ops
from ..masking import PackedBatch, from_flattened, unpad
from .core import is_off
from .parts import tracing_refusal

NAME = "bert_fast"

# What an attention module may be called with if queries, keys and values all come from hidden_states.
OWN_STATES = frozenset(
    {
        "self",
        "hidden_states",
        "attention_mask",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "output_attentions",
        "use_cache",
        "cache_position",
        "layer_idx",
        "cu_seqlens",
        "max_seqlen",
        "kwargs",
    }
)

# Where other states may come in. The modules that can take them say by is_decoder whether they ever do.
OTHER_STATES = frozenset({"key_value_states", "encoder_hidden_states", "encoder_attention_mask"})

# Arguments of an attention function that change the result and that transformers' sdpa overlooks.
OVERLOOKED = ("s_aux", "sinks", "indices", "block_indices")

# And those that it looks at.
UNSERVED = (*OVERLOOKED, "position_bias", "softcap", "sliding_window", "cache", "head_mask", "output_attentions")

# What keeps the packing of a mask: activation checkpointing detaches its inputs, accelerate moves them.
KEEPS_PACKING = (Tensor.detach, Tensor.to, Tensor.cpu, Tensor.cuda)


class PaddingMask(Tensor):
    """A padding mask in the form that every attention of transformers takes, with the packed batch that it describes.

    It is (batch, 1, length, length), 0 where a key is seen and the dtype's least number elsewhere: a view of one row
    for each text. What is computed from it is a plain tensor.
    """

    bert_fast_batch: PackedBatch

    @classmethod
    def make(cls, values: Tensor, batch: PackedBatch) -> PaddingMask:
        mask = values.as_subclass(cls)
        mask.bert_fast_batch = batch
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            source = args[0] if args else None
            if func in KEEPS_PACKING and isinstance(source, PaddingMask) and result is not source:
                batch = source.bert_fast_batch
                return cls.make(result, batch if result.device == source.device else batch.to(result.device))
        return result


# ---- the mask --------------------------------------------------------------------------------------------------------


def _is_plain(x: Any) -> bool:
    """Whether it is a tensor with values that can be looked at here."""
    return type(x) is Tensor and x.device.type in ("cpu", "cuda")


def _hides_padding_alone(arguments: dict[str, Any]) -> bool:
    """Whether all tokens see the same keys: no order, no window, no packed texts, no cache."""
    from transformers.masking_utils import bidirectional_mask_function

    if arguments["mask_function"] is not bidirectional_mask_function or arguments.get("use_vmap"):
        return False
    if arguments.get("local_size") is not None:
        return False
    offsets = (arguments.get("q_offset", 0), arguments.get("kv_offset", 0))
    if not all(isinstance(offset, int) and offset == 0 for offset in offsets):
        return False
    return bool(arguments["q_length"] == arguments["kv_length"])


def attention_mask(**arguments: Any) -> Tensor | None:
    """The mask of a model's layers, made once in a call; the arguments are those of transformers' own functions.

    It is made of numbers to be added, since models with an attention of their own get it as well.
    """
    from transformers.masking_utils import eager_mask

    padding = arguments.get("attention_mask")
    shape = (arguments["batch_size"], arguments["kv_length"])
    device = torch.device(arguments.get("device", "cpu"))
    is_served = (
        tracing_refusal() is None
        and device.type in ("cpu", "cuda")
        and _hides_padding_alone(arguments)
        and (not torch.compiler.is_compiling() if padding is None else _is_plain(padding) and padding.shape == shape)
    )
    if not is_served:
        mask: Tensor | None = eager_mask(**arguments)
        return mask
    dtype = arguments.get("dtype", torch.float32)
    if padding is None:
        batch = unpad(torch.ones(shape, dtype=torch.bool), device=device)
        values = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
    else:
        batch = unpad(padding, device=device)
        visible = torch.zeros((), dtype=dtype, device=device)
        values = torch.where(padding.to(device) != 0, visible, torch.finfo(dtype).min)[:, None, None]
    return PaddingMask.make(values.expand(shape[0], 1, shape[1], shape[1]), batch)


# ---- attention -------------------------------------------------------------------------------------------------------


@functools.cache
def _further_names(cls: Any) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters) - OWN_STATES


def _sources(cls: Any) -> frozenset[str]:
    """The names of what an attention module's forward takes, beyond what any self-attention does."""
    return _further_names(cls)


def _attends_to_itself(module: nn.Module) -> bool:
    """Whether the queries surely are of the tokens that the keys are of.

    In cross-attention a padding mask hides keys alone, and nothing in the call tells it from self-attention if both
    texts are of one length.
    """
    sources = _sources(type(module))
    return not sources or (sources <= OTHER_STATES and getattr(module, "is_decoder", None) is False)


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """As transformers' sdpa has it, where no mask is given."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _texts_in_a_row(cu_seqlens: Tensor, query: Tensor) -> PackedBatch:
    """The batch of texts that a collator has put into one row without padding."""
    rows = query.shape[2]
    if query.shape[0] != 1 or int(cu_seqlens[-1]) != rows:
        raise ValueError(
            f"cu_seq_lens_q ends with {int(cu_seqlens[-1])}; the queries are {query.shape[0]} rows of {rows}"
        )
    return from_flattened(cu_seqlens, device=query.device)


def _same_text(cu_seqlens: Tensor, length: int) -> Tensor:
    """(1, 1, length, length) bool: which columns of a row with many texts are of one text."""
    columns = torch.arange(length, device=cu_seqlens.device)
    text = torch.searchsorted(cu_seqlens.long(), columns, right=True)
    return (text[:, None] == text)[None, None]


def _shows_everything(module: nn.Module, mask: Tensor | None, is_causal: bool | None) -> bool:
    if isinstance(mask, PaddingMask):
        return mask.bert_fast_batch.indices is None
    return mask is None and not _is_causal(module, is_causal)


def _has_shape_of(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether keys and values belong to the queries; their heads may be fewer, each serving as many queries' heads."""
    if not (query.dim() == key.dim() == value.dim() == 4 and key.shape == value.shape and key.shape[1] > 0):
        return False
    is_same = (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:])
    return is_same and query.shape[1] % key.shape[1] == 0


def _packing(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool | None
) -> PackedBatch | None:
    """The batch without its padding; None: attention is not what it serves."""
    if tracing_refusal() is not None or not all(_is_plain(x) for x in (query, key, value)):
        return None
    if not (query.dtype == key.dtype == value.dtype and _has_shape_of(query, key, value)):
        return None
    if ops.choose("attention", query.device.type, query.dtype, query.shape[3]).path == "torch":
        return None  # which pads again
    shape = (query.shape[0], query.shape[2])
    if mask is None:
        if torch.compiler.is_compiling() or _is_causal(module, is_causal):
            return None
        return unpad(torch.ones(shape, dtype=torch.bool), device=query.device)
    if not isinstance(mask, PaddingMask):
        return None
    batch = mask.bert_fast_batch
    if batch.shape != shape or mask.device != query.device:
        return None
    return batch if batch.indices is None or _attends_to_itself(module) else None


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention with the same mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in OVERLOOKED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is given to {type(module).__name__}; attn_implementation {NAME!r} knows no such")
    if isinstance(mask, PaddingMask):
        is_causal = False
        mask = None if mask.bert_fast_batch.indices is None else mask.as_subclass(Tensor)
    if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
        mask = mask.to(query.dtype)
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return result


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models ask for it; where only padding is masked, on the tokens alone.

    Args:
        module: the attention module that asks.
        query, key, value: (batch, heads, length, head_size).
        attention_mask: what the function above made, or a mask of the caller's own.
        dropout, scaling, is_causal, kwargs: as sdpa_attention_forward of transformers takes them.

    Returns:
        (batch, length, heads, head_size), zeros at the padding, and None.
    """
    batch = None
    is_plain = all(kwargs.get(name) is None or kwargs[name] is False for name in UNSERVED)
    if is_plain and dropout < 1.0 and (scaling is None or isinstance(scaling, (int, float))):
        batch = _packing(module, query, key, value, attention_mask, is_causal)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None and _shows_everything(module, attention_mask, is_causal):
        # sdpa would make one text of all.
        if batch is None or torch.compiler.is_compiling():
            batch, attention_mask = None, _same_text(cu_seqlens, query.shape[2])
        else:
            batch = _texts_in_a_row(cu_seqlens, query)
    if batch is None:
        return _sdpa(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    q, k, v = (batch.select(x.transpose(1, 2)) for x in (query, key, value))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = functional.attention(
        q, k, v, batch.cu_seqlens, batch.max_seqlen, tiles=batch.tiles, scale=scaling, dropout_p=dropout
    )
    return batch.pad(out), None


# ---- the registration ------------------------------------------------------------------------------------------------


def register_attention() -> None:
    """Makes attn_implementation="bert_fast" known to transformers: from_pretrained, set_attn_implementation, configs.

    Layers that attend to all tokens of their own text then do so without padding; all other attention, such as causal,
    with a window, across texts or with a bias of the scores, is transformers' sdpa. Hidden states at padding differ
    from the original's. Once registered, it stays as it is.

    Raises:
        ImportError: transformers is missing, or has no registry of attention masks.
    """
    import transformers

    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, eager_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(_too_old(transformers.__version__)) from error
    if not callable(bidirectional_mask_function) or "q_length" not in inspect.signature(eager_mask).parameters:
        raise ImportError(_too_old(transformers.__version__))
    if is_off():
        warnings.warn(f"BERT_FAST=off is set: attn_implementation {NAME!r} is transformers' sdpa", stacklevel=2)
        AttentionInterface.register(NAME, sdpa_attention_forward)
        AttentionMaskInterface.register(NAME, eager_mask)
        return
    torch.compiler.assume_constant_result(_sources)  # not at import: it brings the compiler with it
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def _too_old(version: str) -> str:
    return f"transformers {version} is installed, which registers no attention masks as bert_fast needs it; 5.23 does"

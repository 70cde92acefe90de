"""patch: every model that transformers makes from now on comes out swapped."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from .attention_interface import register_attention
from .core import is_off, knows, swap

# transformers' own from_pretrained, while it is patched.
_originals: dict[str, Any] = {}


def patch(*, int8: bool = False, bf16: bool = False, cuda_graphs: bool = False) -> None:
    """Makes every later from_pretrained of transformers return a swapped model, where bert_fast knows an encoder in it.

    That covers the Auto classes, pipelines and sentence-transformers, which load their models so. Models that it does
    not know come out as they are. Called again it changes the options. attn_implementation="bert_fast" is registered.

    Args:
        int8, bf16, cuda_graphs: as swap takes them.

    Raises:
        ImportError: transformers is missing.
        ValueError: both int8 and bf16 are asked for.
    """
    from transformers import PreTrainedModel

    if int8 and bf16:
        raise ValueError("int8 and bf16 are both True; at most one is allowed")
    if is_off():
        warnings.warn("BERT_FAST=off is set: bert_fast.patch leaves transformers as it is", stacklevel=2)
        return
    _register_attention()
    unpatch()
    found = PreTrainedModel.__dict__["from_pretrained"]
    original = found.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result  # with output_loading_info
        if knows(model):
            swap(model, int8=int8, bf16=bf16, cuda_graphs=cuda_graphs)
        return result

    _originals["from_pretrained"] = found
    setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))  # noqa: B010


def unpatch() -> None:
    """Undoes patch; models that are there already stay as they are."""
    if _originals:
        from transformers import PreTrainedModel

        setattr(PreTrainedModel, "from_pretrained", _originals.pop("from_pretrained"))  # noqa: B010


def _register_attention() -> None:
    try:
        register_attention()
    except ImportError as error:  # a release that has no registry; swapping needs none
        warnings.warn(str(error), stacklevel=3)

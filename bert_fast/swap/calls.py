"""Which calls of transformers' encoders the fast path serves, and what their heads read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..masking import PackedBatch
from .family import FIRST_ROWS, Call, Read, kept_rows
from .parts import tracing_refusal

# Arguments that the fast path serves; any other one that is given a value takes the original path.
SERVED = frozenset(
    {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "num_items_in_batch",  # for the head's loss: transformers' Trainer gives it to every model, heads pass it on
    }
)

# What says, in transformers, that texts stand side by side in one row without padding.
FLATTENED = ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

# What a PackedBatch says already.
SAID_BY_BATCH = ("attention_mask", "token_type_ids", "cu_seq_lens_q", *FLATTENED)

# transformers' names for kernels that compute one and the same attention.
STANDARD_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "bert_fast")

# Those that overlook where texts in one row begin.
UNBOUNDED_ATTENTION = (None, "eager", "sdpa", "flex_attention")


def setting(model: Any, call: Call, name: str) -> Any:
    value = call.get(name)
    return getattr(model.config, name, None) if value is None else value


def config_refusal(model: Any) -> str | None:
    config = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "the model is a decoder"
    if getattr(config, "is_causal", None):
        return "attention is causal"
    if (getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
        return f"position_embedding_type is {config.position_embedding_type!r}"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in STANDARD_ATTENTION:
        return f"attn_implementation is {implementation!r}"
    return None


def _has_numbered_states() -> bool:
    """Whether the installed transformers lets hidden states be asked for by their numbers."""
    try:
        from transformers.utils.output_capturing import selected_hidden_states  # noqa: F401
    except ImportError:
        return False
    return True


def numbers_refusal(model: Any, call: Call) -> str | None:
    """Models whose hidden states transformers does not record itself take numbers for a yes."""
    if isinstance(setting(model, call, "output_hidden_states") or False, bool):
        return None
    if "hidden_states" in (getattr(model, "_can_record_outputs", None) or {}) and _has_numbered_states():
        return None
    return "some of the hidden states are asked for by number"


def wanted_states(model: Any, call: Call, number: int) -> list[bool] | None:
    """For each of the hidden states whether it is asked for; None: the output is to have none.

    Args:
        model: the encoder.
        call: its arguments.
        number: of hidden states: the embeddings and every layer's output.
    """
    wanted = setting(model, call, "output_hidden_states")
    if not wanted:
        return None
    if isinstance(wanted, bool):
        return [True] * number
    chosen = {i % number for i in ([wanted] if isinstance(wanted, int) else wanted) if -number <= i < number}
    return [i in chosen for i in range(number)]


def argument_refusal(model: Any, call: Call) -> str | None:
    if setting(model, call, "output_attentions"):
        return "attention probabilities are asked for"
    for name, value in call.items():
        if value is not None and name not in SERVED:
            return f"{name} is given"
    mask = call.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        return f"attention_mask is a {type(mask).__name__}"
    if mask is not None and mask.dim() != 2:
        return f"attention_mask has {mask.dim()} dimensions"
    if (reason := _flattened_refusal(call)) is not None:
        return reason
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        return "exactly one of input_ids and inputs_embeds is needed"
    return None


def _flattened_refusal(call: Call) -> str | None:
    bounds, others = call.get("cu_seq_lens_q"), [name for name in FLATTENED if call.get(name) is not None]
    if bounds is None:
        return f"{others[0]} is given without cu_seq_lens_q" if others else None
    if call.get("attention_mask") is not None:
        return "attention_mask is given beside cu_seq_lens_q"
    return "texts in one row cannot be told apart while the call is traced" if torch.compiler.is_compiling() else None


def check_bounds(model: Any, call: Call, reason: str) -> None:
    """Of a call that takes the original path.

    Raises:
        ValueError: texts stand in one row, and the model's attention would let them see one another.
    """
    if call.get("cu_seq_lens_q") is None or call.get("attention_mask") is not None:
        return
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation in UNBOUNDED_ATTENTION:
        raise ValueError(
            f"cu_seq_lens_q is given, but the call takes the original path, since {reason}; attn_implementation "
            f"{implementation!r} would let the texts see one another there"
        )


def mode_refusal(model: Any, checkpointed: Iterable[Any]) -> str | None:
    """
    Args:
        model: the encoder.
        checkpointed: what may be told to checkpoint its activations.
    """
    if (reason := tracing_refusal()) is not None:
        return reason
    if model.training and any(getattr(x, "gradient_checkpointing", False) for x in checkpointed):
        return "gradient checkpointing is on"
    return None


def without_batch(call: Call, *, uses_columns: bool) -> dict[str, Any]:
    """The same call with transformers' own arguments in place of a PackedBatch, which was given for input_ids.

    Args:
        call: its arguments.
        uses_columns: see Family.

    Raises:
        ValueError: more is given of what the batch says, or the batch cannot be said in other words.
    """
    given = [name for name in SAID_BY_BATCH if call.get(name) is not None]
    if given:
        raise ValueError(f"{given[0]} is given beside a PackedBatch, which holds it already")
    batch: PackedBatch = call["input_ids"]
    arguments = batch.flattened()
    if not uses_columns:
        del arguments["position_ids"]
    return arguments | {name: value for name, value in call.items() if name != "input_ids" and value is not None}


def _has_holes(rows: Tensor) -> Tensor:
    """(batch,) bool of (batch, length) bool: whether there is False between two that are True."""
    starts = rows[:, 1:] & ~rows[:, :-1]
    return starts.sum(1) + rows[:, :1].sum(1) > 1


def read_rows(model: Any, call: Call) -> Tensor | None:
    """(batch, length) bool: what is read although the mask hides it; None: nothing.

    That are the rows that a head is known to read, and tokens under the mask that are no padding, such as the [MASK]
    tokens that expand ColBERT's queries (Khattab and Zaharia 2020, section 3.2), which attend but are not attended to.
    """
    read, mask = kept_rows.get(), call.get("attention_mask")
    rows = read if isinstance(read, Tensor) else None
    is_padding = None if read is FIRST_ROWS or mask is None else _is_padding(model, call)
    if mask is None or is_padding is None or mask.shape != is_padding.shape:
        return rows
    hidden: Tensor = (mask.to(is_padding.device) == 0) & ~is_padding
    if not torch.compiler.is_compiling() and not bool(hidden.any()):
        return rows
    # Labels that do not fit are left to the head, whose own error says so.
    return hidden if rows is None or rows.shape != hidden.shape else rows.to(hidden.device) | hidden


def _is_padding(model: Any, call: Call) -> Tensor | None:
    """(batch, length) bool: where padding would stand if the mask hides it; None: nobody can say."""
    padding: int | None = getattr(model.config, "pad_token_id", None)
    if padding is None:
        return None
    ids: Tensor | None = call.get("input_ids")
    if ids is not None:
        return ids == padding
    embeds: Tensor = call["inputs_embeds"].detach()
    is_padding = (embeds == 0).all(-1)
    table = getattr(model.get_input_embeddings(), "weight", None)
    if isinstance(table, Tensor) and padding < len(table) and table.shape[1:] == embeds.shape[2:]:
        is_padding = is_padding | (embeds == table[padding].detach().to(embeds)).all(-1)
    return is_padding


def spread_refusal(model: Any, call: Call, *, reads_first: bool, allows_hidden: bool) -> str | None:
    """Why packed rows are not as far apart as their columns, where attention depends on distances; None: they are.

    Args:
        model: the encoder.
        call: its arguments.
        reads_first: whether each text's first row is read, whatever the mask says.
        allows_hidden: whether rows may follow the last key of a text.
    """
    mask = call.get("attention_mask")
    if mask is None or mask.shape[1] == 0:
        return None
    if torch.compiler.is_compiling():
        return "relative positions need a look at the mask, which cannot be had while the call is traced"
    keys = mask.detach() != 0
    read = read_rows(model, call)
    rows = keys if read is None or read.shape != keys.shape else keys | read.to(keys.device)
    if kept_rows.get() is FIRST_ROWS or reads_first:
        rows = rows.clone()
        rows[:, :1] = True
    begins_elsewhere = keys.any(1) & (rows.long().argmax(1) != keys.long().argmax(1))
    is_spread = begins_elsewhere | _has_holes(rows) | _has_holes(keys)
    if not allows_hidden:
        is_spread = is_spread | (keys.any(1) & (rows != keys).any(1))
    return "a text's tokens are not side by side, as relative positions need them" if bool(is_spread.any()) else None


# ---- what heads read -------------------------------------------------------------------------------------------------


def source_of(call: Call) -> Any:
    return call.get("inputs_embeds") if call.get("input_ids") is None else call.get("input_ids")


def first_rows(model: Any, call: Call) -> Read:  # noqa: ARG001
    return FIRST_ROWS


def labelled(model: Any, call: Call) -> Tensor | None:  # noqa: ARG001
    """Heads on tokens flatten labels, so any shape with one for each token will do."""
    source, labels = source_of(call), call.get("labels")
    if source is None or labels is None or labels.numel() != math.prod(source.shape[:2]):
        return None
    is_labelled: Tensor = labels != -100
    return is_labelled.view(source.shape[:2])


def labelled_if_both(model: Any, call: Call) -> Tensor | None:
    """Pretraining's loss needs both kinds of labels; one of them alone is overlooked."""
    return None if call.get("next_sentence_label") is None else labelled(model, call)


def _everything(call: Call) -> Tensor | None:
    source = source_of(call)
    return None if source is None else torch.ones(source.shape[:2], dtype=torch.bool)


def all_if_labelled(model: Any, call: Call) -> Tensor | None:  # noqa: ARG001
    """A causal loss reads a token for the next one's label."""
    return None if call.get("labels") is None else _everything(call)


def all_if_answered(model: Any, call: Call) -> Tensor | None:  # noqa: ARG001
    """The loss of question answering is a softmax over all places, padding among them."""
    has_answers = call.get("start_positions") is not None and call.get("end_positions") is not None
    return _everything(call) if has_answers else None


HeadRows = Callable[[Any, Call], Read]

HEADS: Mapping[str, HeadRows] = {
    "ForSequenceClassification": first_rows,
    "ForMultipleChoice": first_rows,
    "ForNextSentencePrediction": first_rows,
    "ForMaskedLM": labelled,
    "ForPreTraining": labelled_if_both,
    "ForTokenClassification": labelled,
    "ForQuestionAnswering": all_if_answered,
    "ForCausalLM": all_if_labelled,
    "LMHeadModel": all_if_labelled,
}

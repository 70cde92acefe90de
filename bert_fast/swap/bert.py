"""transformers' BertModel and its heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import nn as fast
from .. import reference
from ..config import ACTIVATIONS, BertConfig
from ..masking import PackedBatch, unpad
from .family import Call, Family, kept_rows

MODULE = "transformers.models.bert.modeling_bert"

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
    }
)

# transformers' names for kernels that compute one and the same attention.
STANDARD_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

ACTIVATION_CLASSES: dict[str, fast.Activation] = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
}

# The modules that the fast path steps over: (path within a layer, class).
CONTAINERS = (
    ("", "BertLayer"),
    ("attention", "BertAttention"),
    ("attention.self", "BertSelfAttention", "BertSdpaSelfAttention"),
    ("attention.output", "BertSelfOutput"),
    ("intermediate", "BertIntermediate"),
    ("output", "BertOutput"),
)


class Layer(NamedTuple):
    """The parts of a BertLayer; see nn.EncoderLayerParts."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_norm: nn.Module
    intermediate: nn.Module
    output: nn.Module
    output_norm: nn.Module
    activation: fast.Activation
    attention_dropout: nn.Module
    attention_output_dropout: nn.Module
    output_dropout: nn.Module
    head_size: int


class Embeddings(NamedTuple):
    """The parts of BertEmbeddings; see nn.EmbeddingParts."""

    word: nn.Module
    position: nn.Module
    token_type: nn.Module
    norm: nn.Module
    dropout: nn.Module


def activation_of(module: nn.Module) -> fast.Activation:
    """The fused form of an activation that is known to be GELU, else the module itself."""
    if isinstance(module, nn.GELU):
        return "tanh" if module.approximate == "tanh" else "none"
    return ACTIVATION_CLASSES.get(type(module).__name__, module)


def layer_parts(layer: Any) -> Layer:
    attention, attended, output = layer.attention.self, layer.attention.output, layer.output
    return Layer(
        query=attention.query,
        key=attention.key,
        value=attention.value,
        attention_output=attended.dense,
        attention_norm=attended.LayerNorm,
        intermediate=layer.intermediate.dense,
        output=output.dense,
        output_norm=output.LayerNorm,
        activation=activation_of(layer.intermediate.intermediate_act_fn),
        attention_dropout=attention.dropout,
        attention_output_dropout=attended.dropout,
        output_dropout=output.dropout,
        head_size=attention.attention_head_size,
    )


def embedding_parts(embeddings: Any) -> Embeddings:
    return Embeddings(
        word=embeddings.word_embeddings,
        position=embeddings.position_embeddings,
        token_type=embeddings.token_type_embeddings,
        norm=embeddings.LayerNorm,
        dropout=embeddings.dropout,
    )


# ---- which calls are served ------------------------------------------------------------------------------------------


def _containers(model: Any) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    yield "embeddings", model.embeddings, ("BertEmbeddings",)
    yield "encoder", model.encoder, ("BertEncoder",)
    for index, layer in enumerate(model.encoder.layer):
        for path, *classes in CONTAINERS:
            module = layer
            for name in path.split(".") if path else ():
                module = module._modules[name]
            yield f"encoder.layer.{index}.{path}".rstrip("."), module, tuple(classes)


def _is_listened_to(module: nn.Module) -> bool:
    """Whether somebody has hooked the module; transformers' own recorders of outputs sleep on the fast path."""
    hooks = module._forward_hooks
    if hooks and any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks.values()):
        return True
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _structure_refusal(model: Any) -> str | None:
    for name, module, classes in _containers(model):
        if type(module).__name__ not in classes:
            return f"{name} is a {type(module).__name__}"
        if _is_listened_to(module):
            return f"{name} has hooks"
        if "forward" in module.__dict__:
            return f"{name} has a forward of its own"
    return None


def _setting(model: Any, call: Call, name: str) -> Any:
    value = call.get(name)
    return getattr(model.config, name, None) if value is None else value


def _config_refusal(model: Any) -> str | None:
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


def _argument_refusal(model: Any, call: Call) -> str | None:
    if _setting(model, call, "output_attentions"):
        return "attention probabilities are asked for"
    if not isinstance(_setting(model, call, "output_hidden_states") or False, bool):
        return "some of the hidden states are asked for by number"
    for name, value in call.items():
        if value is not None and name not in SERVED:
            return f"{name} is given"
    mask = call.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return f"attention_mask has {mask.dim()} dimensions"
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        return "exactly one of input_ids and inputs_embeds is needed"
    return None


def refusal(model: Any, call: Call) -> str | None:
    """Why a call takes the original path, or None."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "the model is traced"
    if model.training and any(getattr(layer, "gradient_checkpointing", False) for layer in model.encoder.layer):
        return "gradient checkpointing is on"
    if model.training and getattr(model.encoder, "gradient_checkpointing", False):
        return "gradient checkpointing is on"
    return _argument_refusal(model, call) or _config_refusal(model) or _structure_refusal(model)


# ---- the fast forward ------------------------------------------------------------------------------------------------


def pack_call(model: Any, call: Call) -> tuple[PackedBatch, Tensor | None]:
    """The call's batch without padding, and its inputs_embeds (tokens, hidden_size), if those were given."""
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    source: Any = embeds if ids is None else ids
    shape = tuple(source.shape[:2])
    if source.dim() != (2 if embeds is None else 3):
        raise ValueError(
            f"input_ids or inputs_embeds has shape {tuple(source.shape)}; (batch, length) or (batch, length, "
            "hidden_size) is needed"
        )
    table = model.embeddings.position_embeddings.weight.shape[0]
    if call.get("position_ids") is None and shape[1] > table:
        raise ValueError(f"the batch has length {shape[1]}; max_position_embeddings is {table}")
    mask = call.get("attention_mask")
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool)
    elif tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)} and the batch {shape}")
    types = call.get("token_type_ids")
    keep = kept_rows.get()
    if keep is not None and tuple(keep.shape) != shape:  # labels that do not fit: the head's own error says so
        keep = None
    batch = unpad(
        mask,
        ids=ids,
        token_types=None if types is None else types.expand(shape),
        keep=keep,
        keep_first=model.pooler is not None,
        device=source.device,
    )
    if call.get("position_ids") is not None:
        batch = replace(batch, positions=batch.select(call["position_ids"].expand(shape)))
    return batch, None if embeds is None else batch.select(embeds)


def run(model: Any, call: Call) -> Any:
    """BertModel.forward, without padding between the embeddings and the last layer."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    batch, embeds = pack_call(model, call)
    hidden = fast.embed(embedding_parts(model.embeddings), batch, embeds)
    wants_hidden_states = bool(_setting(model, call, "output_hidden_states"))
    kept = [hidden]
    for layer in model.encoder.layer:
        hidden = fast.encoder_layer(layer_parts(layer), hidden, batch)
        if wants_hidden_states:
            kept.append(hidden)
    sequence_output = batch.pad(hidden)
    pooled = None if model.pooler is None else model.pooler(sequence_output)
    hidden_states = None
    if wants_hidden_states:
        hidden_states = (*(batch.pad(x) for x in kept[:-1]), sequence_output)
    output = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=sequence_output, pooler_output=pooled, hidden_states=hidden_states
    )
    if _setting(model, call, "return_dict") is False:
        return _as_tuple(output)
    return output


def _as_tuple(output: Any) -> tuple[Any, ...]:
    """The output as the installed transformers gives it with return_dict=False; before 5 no pooler left a None."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        return tuple(output.to_tuple())
    extra = () if output.hidden_states is None else (output.hidden_states,)
    return (output.last_hidden_state, output.pooler_output, *extra)


# ---- the oracle, and what heads read ---------------------------------------------------------------------------------


def oracle(model: Any, call: Call) -> Tensor:
    """The last hidden state (batch, length, hidden_size) in float64 on the CPU, by bert_fast.reference."""
    weights = {
        name: value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
        for name, value in model.state_dict().items()
    }
    config = BertConfig.from_dict(
        {**model.config.to_dict(), "model_type": "bert", "is_decoder": False, "pad_token_id": 0}
    )
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    inputs = {name: call[name].detach().cpu() for name in names if call.get(name) is not None}
    if "inputs_embeds" in inputs:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].double()
    return reference.bert(weights, config, **inputs).hidden_states[-1]


def _labelled(call: Call) -> Tensor | None:
    labels = call.get("labels")
    return None if labels is None else labels != -100


def _everything(call: Call) -> Tensor | None:
    """The loss of question answering is a softmax over all places, padding among them: they are computed, too."""
    source = call.get("inputs_embeds") if call.get("input_ids") is None else call.get("input_ids")
    if source is None or call.get("start_positions") is None or call.get("end_positions") is None:
        return None
    return torch.ones(source.shape[:2], dtype=torch.bool)


FAMILY: Family = Family(
    name="BERT",
    module=MODULE,
    encoder="BertModel",
    refusal=refusal,
    run=run,
    oracle=oracle,
    kept_rows={
        "BertForMaskedLM": _labelled,
        "BertForPreTraining": _labelled,
        "BertForTokenClassification": _labelled,
        "BertForQuestionAnswering": _everything,
    },
)

assert set(ACTIVATION_CLASSES.values()) == set(ACTIVATIONS.values())

"""ModernBERT (Warner et al. 2024): rotary positions, layers that see a window or everything, gated feed-forward layers,
norms first and after the last layer, and no biases."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..nn import NO_DROPOUT, Slice
from .bert_shaped import BertShaped
from .calls import all_if_answered, first_rows, labelled, spread_refusal
from .family import FIRST_ROWS, Call, Read
from .parts import Layer, Refused, activation_in, activation_of, leaf, stack_of
from .plan import Embeddings, Plan, Rotary

FULL, SLIDING = KINDS = ("full_attention", "sliding_attention")

# Their angles follow the length of the batch, padding and all.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def pooled_rows(model: Any, call: Call) -> Read:
    """Heads read the first token, or the mean of what the mask shows."""
    return first_rows(model, call) if model.config.classifier_pooling == "cls" else None


def chosen_rows(model: Any, call: Call) -> Read:
    """Multiple choice reads the place where the mask is largest, not the first: any number in a mask is a token."""
    mask = call.get("attention_mask")
    if model.config.classifier_pooling != "cls" or mask is None:
        return pooled_rows(model, call)
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.numel() == 0:
        return None  # the fast path serves none of these
    mask = mask.detach().reshape(-1, mask.shape[-1])
    places = mask.argmax(1, keepdim=True)
    if not places.any():
        return FIRST_ROWS
    return torch.zeros(mask.shape, dtype=torch.bool, device=mask.device).scatter(1, places, True)


def _slices(linear: nn.Module, count: int, width: int) -> list[Slice]:
    """Equal parts of the outputs of a linear map."""
    return [Slice(linear, part * width, (part + 1) * width) for part in range(count)]


class ModernBertShaped(BertShaped):
    uses_columns = False  # only distances count

    def checkpointed(self, model: Any) -> Iterable[Any]:
        return (model, *model.layers)

    def layer(self, layers: nn.Module, name: str) -> Layer:
        layer: Any = self.container(layers, name, "EncoderLayer")
        attention: Any = self.container(layer, "attn", "Attention")
        feed_forward: Any = self.container(layer, "mlp", "MLP")
        if layer.attention_type not in KINDS:
            raise Refused(layer, f"has the attention type {layer.attention_type!r}; {FULL} and {SLIDING} are known")
        config = attention.config
        query, key, value = _slices(leaf(attention, "Wqkv"), 3, attention.head_dim * config.num_attention_heads)
        intermediate, gate = _slices(leaf(feed_forward, "Wi"), 2, config.intermediate_size)
        return Layer(
            query=query,
            key=key,
            value=value,
            attention_output=leaf(attention, "Wo"),
            attention_norm=leaf(layer, "attn_norm"),
            intermediate=intermediate,
            gate=gate,
            output=leaf(feed_forward, "Wo"),
            output_norm=leaf(layer, "mlp_norm"),
            activation=activation_in(feed_forward, "act"),
            attention_dropout_p=attention.attention_dropout if attention.training else 0.0,
            attention_output_dropout=leaf(attention, "out_drop"),
            inner_dropout=leaf(feed_forward, "drop"),
            output_dropout=NO_DROPOUT,
            head_size=attention.head_dim,
            norm_first=True,
            window=config.sliding_window if layer.attention_type == SLIDING else None,
            rotation=KINDS.index(layer.attention_type),
        )

    def parts(self, model: Any) -> Plan:
        embeddings = self.container(model, "embeddings", "Embeddings")
        layers: Any = leaf(model, "layers")
        parts = [self.layer(layers, name) for name in layers._modules]
        used = tuple(sorted({layer.attention_type for layer in layers}))
        return Plan(
            Embeddings(
                word=leaf(embeddings, "tok_embeddings"),
                position=None,
                token_type=None,
                norm=leaf(embeddings, "norm"),
                dropout=leaf(embeddings, "drop"),
            ),
            None,
            parts,
            stack_of(model, parts),
            rotary=Rotary(self.container(model, "rotary_emb", "RotaryEmbedding"), KINDS, used),
            final_norm=leaf(model, "final_norm"),
        )

    def is_current(self, model: Any, plan: Plan) -> bool:
        return all(layer.window in (None, model.config.sliding_window) for layer in plan.layers)

    def widths(self, model: Any) -> Mapping[str, int]:
        return {**super().widths(model), "gelu": model.config.intermediate_size}

    def refusal(self, model: Any, call: Call) -> str | None:
        kinds = getattr(getattr(model, "rotary_emb", None), "rope_type", None)
        if not isinstance(kinds, dict):
            return "this release of transformers has rotary positions elsewhere"
        for kind in kinds.values():
            if kind in LENGTH_DEPENDENT:
                return f"rotary positions of type {kind!r} depend on the padding"
        positions = call.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() != 2:  # such as would differ between heads
            return f"position_ids has {positions.dim()} dimensions"
        # Where no key is within the window SDPA gives zeros, as we do, but the eager formula the mean of everything.
        is_eager = getattr(model.config, "_attn_implementation", None) == "eager"
        return spread_refusal(model, call, reads_first=False, allows_hidden=not is_eager)

    def output(self, sequence: Tensor, pooled: Tensor | None, hidden_states: tuple[Tensor, ...] | None) -> Any:  # noqa: ARG002
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=sequence, hidden_states=hidden_states)

    def oracle(self, model: Any, call: Call) -> Tensor:
        """The last hidden state (batch, length, hidden_size) in float64 on the CPU, by bert_fast.reference."""
        exact = copy.deepcopy(model).to("cpu", torch.float64)
        embeds, mask = call.get("inputs_embeds"), call.get("attention_mask")
        words = exact.embeddings.tok_embeddings.weight
        embedded = words[call["input_ids"].cpu()] if embeds is None else embeds.cpu().double()
        positions = call.get("position_ids")
        positions = torch.arange(embedded.shape[1])[None] if positions is None else positions.cpu()

        def normalise(norm: Any, x: Tensor) -> Tensor:
            bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
            return reference.layer_norm(x, norm.weight, bias, norm.eps)

        layers = []
        for layer in exact.layers:
            cosines, sines = exact.rotary_emb(embedded, positions, layer.attention_type)
            half = cosines.shape[-1] // 2
            layers.append(
                reference.RotaryLayer(
                    dict(layer.named_parameters()),
                    model.config.num_attention_heads,
                    activation_of(layer.mlp.act),
                    layer.mlp_norm.eps,
                    model.config.sliding_window if layer.attention_type == SLIDING else None,
                    cosines[..., :half],
                    sines[..., :half],
                )
            )
        with torch.no_grad():
            hidden = normalise(exact.embeddings.norm, embedded)
            hidden = reference.rotary_encoder(layers, hidden, None if mask is None else mask.cpu() != 0)
            return normalise(exact.final_norm, hidden)


MODERNBERT = ModernBertShaped(
    "ModernBERT",
    "transformers.models.modernbert.modeling_modernbert",
    "ModernBert",
    {
        "ForMaskedLM": labelled,
        "ForMultipleChoice": chosen_rows,
        "ForQuestionAnswering": all_if_answered,
        "ForSequenceClassification": pooled_rows,
        "ForTokenClassification": labelled,
    },
).family()

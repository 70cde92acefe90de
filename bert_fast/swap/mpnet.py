"""MPNet (Song et al. 2020): RoBERTa's positions, no token types, and a bias of the scores by relative position."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .bert_shaped import with_gap
from .calls import HEADS, spread_refusal
from .distilbert import HEAD_NAMES
from .family import Call
from .parts import Layer, activation_in, leaf
from .plan import RelativeBias
from .roberta import RobertaShaped

BUCKETS = 32  # whatever the configuration says

BERT_NAMES = {
    "attention.attn.q": "attention.self.query",
    "attention.attn.k": "attention.self.key",
    "attention.attn.v": "attention.self.value",
    "attention.attn.o": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
}


@functools.lru_cache(maxsize=16)
def _buckets(reach: int, device: torch.device) -> Tensor:
    """(2 * reach + 1,) int64: the bucket of each distance from -reach to reach."""
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    encoder: Any = MPNetEncoder
    with torch.inference_mode(False):  # what is kept must serve calls with gradients, too
        distances = torch.arange(-reach, reach + 1, device=device)
        buckets: Tensor = encoder.relative_position_bucket(distances, num_buckets=BUCKETS)
    return buckets


class MPNetShaped(RobertaShaped):
    def layer(self, layers: nn.Module, name: str) -> Layer:
        layer = self.container(layers, name, "Layer")
        attention = self.container(layer, "attention", "Attention")
        attend: Any = self.container(attention, "attn", "SelfAttention")
        intermediate: Any = self.container(layer, "intermediate", "Intermediate")
        output = self.container(layer, "output", "Output")
        return Layer(
            query=leaf(attend, "q"),
            key=leaf(attend, "k"),
            value=leaf(attend, "v"),
            attention_output=leaf(attend, "o"),
            attention_norm=leaf(attention, "LayerNorm"),
            intermediate=leaf(intermediate, "dense"),
            output=leaf(output, "dense"),
            output_norm=leaf(output, "LayerNorm"),
            activation=activation_in(intermediate, "intermediate_act_fn"),
            attention_dropout_p=attend.dropout.p if attend.training else 0.0,
            attention_output_dropout=leaf(attention, "dropout"),
            output_dropout=leaf(output, "dropout"),
            head_size=attend.attention_head_size,
        )

    def relative_bias(self, model: Any) -> RelativeBias:
        longest = self.longest(model)
        return RelativeBias(leaf(model.encoder, "relative_attention_bias"), longest or 0, _buckets)

    def refusal(self, model: Any, call: Call) -> str | None:
        has_pooler = getattr(model, "pooler", None) is not None
        return spread_refusal(model, call, reads_first=has_pooler, allows_hidden=True)

    def as_tuple(self, output: Any) -> tuple[Any, ...]:
        return with_gap(output)

    def output(self, sequence: Tensor, pooled: Tensor | None, hidden_states: tuple[Tensor, ...] | None) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=sequence, pooler_output=pooled, hidden_states=hidden_states)

    def score_bias(self, model: Any, length: int) -> Tensor:
        some: Tensor = torch.empty(1, length, device=model.device)
        with torch.no_grad():
            bias: Tensor = model.encoder.compute_position_bias(some)
        return bias[0].to("cpu", torch.float64)


MPNET = MPNetShaped(
    "MPNet",
    "transformers.models.mpnet.modeling_mpnet",
    "MPNet",
    {name: HEADS[name] for name in HEAD_NAMES},
    bert_names=BERT_NAMES,
).family()

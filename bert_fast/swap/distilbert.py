"""DistilBERT (Sanh et al. 2019): BERT's layers under other names, without token types and pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..nn import NO_DROPOUT
from .bert_shaped import BertShaped
from .calls import HEADS
from .parts import Layer, activation_in, leaf

HEAD_NAMES = (
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)

BERT_NAMES = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


class DistilBertShaped(BertShaped):
    def layer(self, layers: nn.Module, name: str) -> Layer:
        layer = self.container(layers, name, "TransformerBlock")
        attention: Any = self.container(layer, "attention", "SelfAttention", "SdpaAttention", "MultiHeadSelfAttention")
        feed_forward: Any = self.container(layer, "ffn", "FFN")
        return Layer(
            query=leaf(attention, "q_lin"),
            key=leaf(attention, "k_lin"),
            value=leaf(attention, "v_lin"),
            attention_output=leaf(attention, "out_lin"),
            attention_norm=leaf(layer, "sa_layer_norm"),
            intermediate=leaf(feed_forward, "lin1"),
            output=leaf(feed_forward, "lin2"),
            output_norm=leaf(layer, "output_layer_norm"),
            activation=activation_in(feed_forward, "activation"),
            attention_dropout_p=attention.dropout.p if attention.training else 0.0,
            attention_output_dropout=NO_DROPOUT,
            output_dropout=leaf(feed_forward, "dropout"),
            head_size=attention.dim // attention.n_heads,
        )

    def widths(self, model: Any) -> Mapping[str, int]:
        config = model.config
        return {"attention": config.dim // config.n_heads, "layer_norm": config.dim, "gelu": config.hidden_dim}

    def output(self, sequence: Tensor, pooled: Tensor | None, hidden_states: tuple[Tensor, ...] | None) -> Any:  # noqa: ARG002
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=sequence, hidden_states=hidden_states)

    def sizes(self, model: Any) -> dict[str, Any]:
        config = model.config
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.dim,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "intermediate_size": config.hidden_dim,
            "hidden_act": config.activation,
            "max_position_embeddings": config.max_position_embeddings,
            "layer_norm_eps": model.embeddings.LayerNorm.eps,
        }


DISTILBERT = DistilBertShaped(
    "DistilBERT",
    "transformers.models.distilbert.modeling_distilbert",
    "DistilBert",
    {name: HEADS[name] for name in HEAD_NAMES},
    layers="transformer",
    bert_names=BERT_NAMES,
).family()

"""The shape of a BERT model, under the names that Hugging Face configurations use."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ACTIVATIONS: dict[str, Literal["none", "tanh"]] = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
"""Activation names and the `approximate` argument that each stands for: erf ("none") is never replaced by tanh."""


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes and rates of a BERT model (Devlin et al. 2018, section 3). The defaults are BERT-base, uncased.

    Attributes:
        vocab_size: WordPiece tokens.
        hidden_size: width of the hidden states.
        num_hidden_layers: encoder layers.
        num_attention_heads: heads; they divide hidden_size.
        intermediate_size: width of the feed-forward layer.
        hidden_act: one of ACTIVATIONS.
        hidden_dropout_prob: dropout rate after embeddings and after each sublayer.
        attention_probs_dropout_prob: dropout rate of the attention probabilities.
        max_position_embeddings: longest sequence.
        type_vocab_size: segment types.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: added to the variance in LayerNorm.
        pad_token_id: id of [PAD]; its embedding gets no gradient.
        classifier_dropout: dropout rate before a classifier; None: hidden_dropout_prob.

    Raises:
        ValueError: a size below 1, heads that do not divide hidden_size, a rate outside [0, 1), an unknown hidden_act.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must lie in [0, 1)")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_attention_heads is {self.num_attention_heads}; "
                "the heads must divide the hidden size"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; it must be one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}; it must lie in [0, {self.vocab_size})")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BertConfig:
        """The configuration of a Hugging Face config.json; entries that BERT's arithmetic does not use are ignored.

        Raises:
            ValueError: the configuration is of another architecture, or asks for something that this model does not do.
        """
        model_type = values.get("model_type", "bert")
        if model_type != "bert":
            raise ValueError(f"model_type is {model_type!r}; it must be 'bert'")
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"position_embedding_type is {values['position_embedding_type']!r}; only 'absolute' is supported"
            )
        if values.get("is_decoder") or values.get("add_cross_attention"):
            raise ValueError("is_decoder or add_cross_attention is true; only the bidirectional encoder is supported")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> BertConfig:
        """Reads config.json in the folder `path`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: see from_dict.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; path must be a folder with a Hugging Face checkpoint")
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """The entries of a Hugging Face config.json, without `architectures`."""
        return {"model_type": "bert", "position_embedding_type": "absolute", **dataclasses.asdict(self)}

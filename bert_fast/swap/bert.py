"""BERT, and every checkpoint that is loaded as one: MiniLM, E5, BGE, GTE, ..."""

from __future__ import annotations

from .bert_shaped import TOKEN_HEADS, BertShaped
from .family import TokenHead

PRETRAINING = TokenHead(("prediction_logits",), is_of_vocabulary=True, text_labels=("next_sentence_label",))

FAMILY = BertShaped(
    "BERT",
    "transformers.models.bert.modeling_bert",
    "Bert",
    token_heads={**TOKEN_HEADS, "ForPreTraining": PRETRAINING},
).family()

"""BERT, and every checkpoint that is loaded as one: MiniLM, E5, BGE, GTE, ..."""

from __future__ import annotations

from .bert_shaped import BertShaped

FAMILY = BertShaped("BERT", "transformers.models.bert.modeling_bert", "Bert").family()

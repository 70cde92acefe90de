"""RoBERTa (Liu et al. 2019) and what has its modules: positions are counted from behind the padding token's number, and
count only tokens that are not that one, whatever the mask says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bert_shaped import BertShaped
from .family import Call


class RobertaShaped(BertShaped):
    uses_columns = False

    def positions(self, model: Any, call: Call) -> Tensor:
        padding: int = model.embeddings.padding_idx
        ids = call.get("input_ids")
        if ids is None:
            embeds = call["inputs_embeds"]
            return torch.arange(padding + 1, padding + 1 + embeds.shape[1], device=embeds.device).expand(
                embeds.shape[:2]
            )
        is_token: Tensor = ids != padding
        return is_token.cumsum(1) * is_token + padding

    def flat_positions(self, model: Any, columns: Tensor) -> Tensor:
        return columns + int(model.embeddings.padding_idx) + 1

    def longest(self, model: Any) -> int | None:
        longest = super().longest(model)
        return None if longest is None else longest - 1 - int(model.embeddings.padding_idx)


ROBERTA = RobertaShaped("RoBERTa", "transformers.models.roberta.modeling_roberta", "Roberta").family()
XLM_ROBERTA = RobertaShaped(
    "XLM-RoBERTa", "transformers.models.xlm_roberta.modeling_xlm_roberta", "XLMRoberta"
).family()
CAMEMBERT = RobertaShaped("CamemBERT", "transformers.models.camembert.modeling_camembert", "Camembert").family()

"""ELECTRA (Clark et al. 2020), discriminator and generator: embeddings may be narrower than layers; no pooler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .bert_shaped import BertShaped
from .calls import HEADS
from .family import Call


class ElectraShaped(BertShaped):
    def output(self, sequence: Tensor, pooled: Tensor | None, hidden_states: tuple[Tensor, ...] | None) -> Any:  # noqa: ARG002
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=sequence, hidden_states=hidden_states)


def _first_tokens(model: Any, call: Call) -> Tensor | None:  # noqa: ARG001
    """Multiple choice, (batch, choices, length): most of the ways to summarise a choice read its first token."""
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if ids is not None:
        *texts, length = ids.shape
    elif embeds is not None:
        *texts, length = embeds.shape[:-1]
    else:
        return None
    keep = torch.zeros(math.prod(texts), length, dtype=torch.bool)
    keep[:, :1] = True
    return keep


ELECTRA = ElectraShaped(
    "ELECTRA",
    "transformers.models.electra.modeling_electra",
    "Electra",
    {**HEADS, "ForPreTraining": lambda *_: None, "ForMultipleChoice": _first_tokens},
).family()

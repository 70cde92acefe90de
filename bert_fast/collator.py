"""A data collator that puts texts side by side instead of padding them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

__all__ = ["FlatteningCollator"]

# What belongs to a batch that is padded.
PADDED = frozenset({"attention_mask", "special_tokens_mask", "offset_mapping"})


@dataclass(frozen=True)
class FlatteningCollator:
    """Makes the keyword arguments of a swapped model out of examples, without any padding.

    Unlike transformers' DataCollatorWithFlattening it keeps token types and leaves labels as they are.

    Attributes:
        first_position: position of each text's first token: 0 for BERT, pad_token_id + 1 for RoBERTa and its kin. None
            leaves positions to the model, which knows.
        keys: of the examples that are taken along, each with a value for every token; all of them, where None, but for
            what belongs to padding. One with a single value, such as a class, is stacked in any case.
    """

    first_position: int | None = None
    keys: Sequence[str] | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: as a tokenizer makes them, of one text each, not padded.

        Returns:
            input_ids and whatever else has a value for each token, (1, tokens); what has one for each text, (texts,);
            cu_seq_lens_q and cu_seq_lens_k, (texts + 1,) int32, the texts' bounds; max_length_q and max_length_k.

        Raises:
            ValueError: no examples, or values of other lengths than their text.
        """
        if not examples:
            raise ValueError("examples is empty; at least one is needed")
        names = [name for name in examples[0] if name not in PADDED] if self.keys is None else list(self.keys)
        lengths = [len(example["input_ids"]) for example in examples]
        batch: dict[str, Any] = {}
        for name in names:
            values = [torch.as_tensor(_of(example, number, name)) for number, example in enumerate(examples)]
            if all(value.dim() == 0 for value in values):
                batch[name] = torch.stack(values)
                continue
            for number, (value, length) in enumerate(zip(values, lengths, strict=True)):
                if value.shape[:1] != (length,):
                    raise ValueError(
                        f"{name} of example {number} has shape {tuple(value.shape)} and its input_ids {length} tokens"
                    )
            batch[name] = torch.cat(values)[None]
        if self.first_position is not None:
            columns = [torch.arange(length) + self.first_position for length in lengths]
            batch["position_ids"] = torch.cat(columns)[None]
        bounds: Tensor = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        longest = max(lengths)
        return {
            **batch,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _of(example: Mapping[str, Any], number: int, name: str) -> Any:
    if name not in example:
        raise ValueError(f"example {number} has no {name!r}; it has {', '.join(map(repr, example))}")
    return example[name]

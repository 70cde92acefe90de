"""Windows of contexts that are too long for a model, each with its question before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.squad import Span

__all__ = ["CLS", "Cut", "Window", "contexts_of", "cut_windows"]

CLS = 0
"""Position of [CLS], which stands for "no answer in this window"."""

CHUNK = 512  # questions that are tokenised together


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Lengths in tokens.

    Attributes:
        window: of a window, with its question and special tokens, at most.
        shared: of the part of the context that neighbouring windows share.
        question: of the question at most; the rest of it is cut off.
    """

    window: int
    shared: int
    question: int


@dataclass(frozen=True)
class Window:
    """
    Attributes:
        question: whose it is.
        inputs: of the model.
        first: position of the first token of the context.
        offsets: (tokens of the context, 2) int32: where each begins and ends in the context's characters.
        covers: characters of the context that are in it, begin and end.
    """

    question: int
    inputs: dict[str, list[int]]
    first: int
    offsets: np.ndarray[Any, np.dtype[np.int32]]
    covers: tuple[int, int]

    def positions(self, answer: Span) -> tuple[int, int]:
        """The answer's first and last token; [CLS] for both where it is not within the window, or only in part."""
        begin = answer.start + len(answer.text) - len(answer.text.lstrip())
        end = answer.start + len(answer.text.rstrip())
        if not self.covers[0] <= begin < end <= self.covers[1]:
            return CLS, CLS
        tokens = np.flatnonzero((self.offsets[:, 1] > begin) & (self.offsets[:, 0] < end))
        return (self.first + int(tokens[0]), self.first + int(tokens[-1])) if len(tokens) else (CLS, CLS)


def cut_windows(tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], cut: Cut) -> Iterator[Window]:
    """The windows of each context, in order.

    Args:
        tokenizer: transformers' fast one. Afterwards it pads and cuts on the right.
        questions: texts.
        contexts: text of each question.
        cut: how long they are.

    Raises:
        ValueError: a window has no room for more than what it shares with the next, or [CLS] is not its first token.
    """
    room = cut.window - cut.question - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= cut.shared:
        raise ValueError(
            f"max_length is {cut.window} and longest_question {cut.question}, which leaves {max(0, room)} tokens of a "
            f"window for its context; it must be more than stride, which is {cut.shared}"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    for start in range(0, len(questions), CHUNK):
        chunk = slice(start, start + CHUNK)
        for window in _windows(tokenizer, _shortened(tokenizer, questions[chunk], cut), contexts[chunk], cut):
            yield Window(start + window.question, window.inputs, window.first, window.offsets, window.covers)


def contexts_of(windows: Sequence[Window], length: int) -> Tensor:
    """(windows, length) bool: whether a position of a batch is a token of the context."""
    first = torch.tensor([[window.first] for window in windows])
    count = torch.tensor([[len(window.offsets)] for window in windows])
    positions = torch.arange(length)
    return (positions >= first) & (positions < first + count)


def _shortened(tokenizer: Any, questions: Sequence[str], cut: Cut) -> list[str]:
    encoded = tokenizer(
        list(questions),
        add_special_tokens=False,
        truncation=True,
        max_length=cut.question + 1,
        return_offsets_mapping=True,
    )
    return [
        question if len(offsets) <= cut.question else question[: offsets[cut.question][0]]
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def _windows(tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], cut: Cut) -> Iterator[Window]:
    encoded = tokenizer(
        questions,
        list(contexts),
        truncation="only_second",
        max_length=cut.window,
        stride=cut.shared,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    tokenizer.backend_tokenizer.no_truncation()  # it may be saved, and others may read single texts with it
    all_offsets = encoded.pop("offset_mapping")
    of_question = encoded.pop("overflow_to_sample_mapping")
    for index, question in enumerate(of_question):
        inputs = {name: values[index] for name, values in encoded.items()}
        if inputs["input_ids"][CLS] != tokenizer.cls_token_id:
            raise ValueError("the tokenizer does not begin with [CLS], which is needed")
        part = encoded.sequence_ids(index)
        count = part.count(1)
        first = part.index(1) if count else len(part)
        offsets = np.array(all_offsets[index][first : first + count], np.int32).reshape(count, 2)
        begin = 0 if index == 0 or of_question[index - 1] != question else int(offsets[0, 0])
        is_last = index + 1 == len(of_question) or of_question[index + 1] != question
        end = len(contexts[question]) if is_last else int(offsets[-1, 1])
        yield Window(question, inputs, first, offsets, (begin, end))

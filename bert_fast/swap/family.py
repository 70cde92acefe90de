"""What swapping needs to know of a model family. Each family is one small module beside this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import engine
from ..masking import PackedBatch

Call = Mapping[str, Any]
"""The arguments of a forward call by name, defaults left out."""


class FirstRows:
    """Says that a head reads no row but the pooler's, each sequence's first."""


FIRST_ROWS = FirstRows()


@dataclass(eq=False)
class PackedRead:
    """A head that takes the encoder's last hidden state as packed rows, (1, rows, hidden_size).

    Attributes:
        encoder: that it reads.
        plan: what the encoder runs on.
        batch: the batch without padding.
        embeds: (tokens, hidden_size), its inputs_embeds; None where it has ids.
        rows: (rows,) int64, the packed rows that it reads; None: all.
        is_of_texts: whether those are each text's first, so that it gets (texts, 1, hidden_size).
        hidden: (tokens, hidden_size), the last hidden state, once it is there.
    """

    encoder: Any
    plan: Any
    batch: PackedBatch
    embeds: Tensor | None
    rows: Tensor | None
    is_of_texts: bool = False
    hidden: Tensor | None = None


Read = Tensor | FirstRows | PackedRead | None


class KeptRows:
    """What a head reads of its encoder, set around the encoder's call.

    Rows (batch, length) bool that it reads although the mask hides them, FIRST_ROWS, or a PackedRead; None: what
    everybody reads.

    torch.compile traces no context variables. While it traces, an attribute serves instead: what is traced is one call,
    and the graph that comes of it holds the rows themselves.
    """

    def __init__(self) -> None:
        self.context: ContextVar[Read] = ContextVar("bert_fast_kept_rows", default=None)
        self.traced: Read = None

    def get(self) -> Read:
        return self.traced if torch.compiler.is_compiling() else self.context.get()

    def call(self, rows: Read, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs), within which get() gives the rows."""
        if torch.compiler.is_compiling():
            self.traced = rows
            try:
                return function(*args, **kwargs)
            finally:
                self.traced = None
        token = self.context.set(rows)
        try:
            return function(*args, **kwargs)
        finally:
            self.context.reset(token)


kept_rows = KeptRows()


@dataclass(frozen=True)
class Rounding:
    """In how few bits the CPU engine is to multiply.

    Attributes:
        products: of the encoder's linear layers.
        exact: names, within the encoder, of the modules that multiply in float32 all the same.
    """

    products: engine.Products
    exact: tuple[str, ...] = ()


class TokenHead(NamedTuple):
    """
    Attributes:
        logits: names of the outputs with an entry for each token.
        is_of_vocabulary: whether there are so many classes that only labelled rows are worth it.
        competes: whether the tokens of a text are compared with one another; padding then has the lowest number.
        text_labels: arguments with a label for each text.
    """

    logits: tuple[str, ...] = ("logits",)
    is_of_vocabulary: bool = False
    competes: bool = False
    text_labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Family:
    """
    Attributes:
        name: for people.
        module: the Python module that defines the classes.
        encoder: the class whose forward is replaced.
        steps: methods of the encoder that the fast forward stands in for; a subclass that changes one is not known.
        plan: the parts that a call runs on, or, as a string, why it takes the original path.
        run: the fast forward of the encoder, given the plan.
        stack: the encoder's layers as the CPU engine sees them.
        widths: operator -> size of the dimension that its kernel works along, for an encoder.
        oracle: the encoder's last hidden state (batch, length, hidden_size), in float64 on the CPU.
        view: the same of an output, and (batch, length) bool where tokens are, on the CPU; None: everywhere.
        pack: the batch of a call without padding, and its inputs_embeds (tokens, hidden_size), if those were given.
        token_heads: heads that say something of each token -> what they are like.
        uses_columns: whether calls that say nothing of positions have their tokens at their columns.
        kept_rows: for heads that read other rows than all that the mask shows: class -> (head, call -> what it reads).
    """

    name: str
    module: str
    encoder: str
    steps: tuple[str, ...]
    plan: Callable[[Any, Call], Any]
    run: Callable[[Any, Call, Any], Any]
    stack: Callable[[Any], engine.Stack]
    widths: Callable[[Any], Mapping[str, int]]
    oracle: Callable[[Any, Call], Tensor]
    view: Callable[[Any, Call, Any], tuple[Tensor, Tensor | None]]
    kept_rows: Mapping[str, Callable[[Any, Call], Read]]
    pack: Callable[[Any, Call], tuple[PackedBatch, Tensor | None]] | None = None
    token_heads: Mapping[str, TokenHead] = field(default_factory=dict)
    uses_columns: bool = False

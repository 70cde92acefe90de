"""All columns of a batch of pairs or triples through the model at once."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from ..swap.core import swapped_encoders

__all__ = ["in_one_forward"]

MERGING = "sentence_transformers.base.losses.merged_forward"  # from 6.2 on


class _OneForward:
    """A mix-in for sentence-transformers' losses on embeddings."""

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Any:
        """The loss of columns' embeddings; columns whose features differ in kind go one by one."""
        from sentence_transformers.base.losses.merged_forward import embed_columns

        loss: Any = self
        embeddings = embed_columns(loss.model, sentence_features, separate_first=False)
        return loss.compute_loss_from_embeddings(embeddings, labels)


def in_one_forward(loss: nn.Module) -> nn.Module:
    """Makes a loss embed all columns of a batch in one forward pass, in place; loss and gradients stay the same.

    sentence-transformers leaves the first column a pass of its own, for beside long passages short queries would be
    padded. A swapped model pads nothing, and one product over all tokens is faster than two.

    Args:
        loss: of sentence-transformers, on a SentenceTransformer. One that caches gradients or computes from something
            else than embeddings stays as it is, and so does one whose model is not swapped.
    """
    model: Any = loss.model
    is_swapped = next(swapped_encoders(model), None) is not None
    if is_swapped and hasattr(loss, "compute_loss_from_embeddings") and find_spec(MERGING) is not None:
        kind = type(loss)
        loss.__class__ = type(kind.__name__, (_OneForward, kind), {})
    return loss

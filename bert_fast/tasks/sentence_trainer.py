"""sentence-transformers' Trainers for the tasks on pairs and passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .hugging_face import quiet
from .loop import judged
from .task import Model

__all__ = ["save", "trainer"]


class _Plain:
    """A mix-in for sentence-transformers' Trainers: no cards, and the best checkpoint is loaded or an error."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """finetune writes the card."""

    def _load_best_model(self) -> None:
        """Theirs logs what goes wrong and keeps the last weights."""
        this: Any = self
        this._load_from_checkpoint(this.state.best_model_checkpoint)


def trainer(
    model: Model, rows: Mapping[str, Sequence[Any]], arguments: dict[str, Any], loss: nn.Module, **options: Any
) -> Any:
    """A Trainer, Judged, of a SentenceTransformer or a CrossEncoder.

    Args:
        model: swapped.
        rows: columns of the training rows by name: texts in the order that the loss wants, and perhaps "label".
        arguments: see loop.arguments.
        loss: of sentence-transformers, on the model.
        options: further TrainingArguments of sentence-transformers.
    """
    import datasets
    import sentence_transformers as theirs

    kind = "CrossEncoder" if isinstance(model.module, theirs.CrossEncoder) else "SentenceTransformer"
    base: Any = getattr(theirs, f"{kind}Trainer")
    data = datasets.Dataset.from_dict(dict(rows))
    with quiet():
        return judged(type(base.__name__, (_Plain, base), {}))(
            model=model.module,
            args=getattr(theirs, f"{kind}TrainingArguments")(**arguments, **options),
            train_dataset=data,
            eval_dataset=data.select(range(1)),  # there must be one; Judged reads its own
            loss=loss,
        )


def save(trainer: Any, folder: Path) -> None:
    """Writes the model as sentence-transformers loads it, without a card."""
    trainer.model.save_pretrained(str(folder), create_model_card=False)

"""What a task is: how its files are read, and how its model is built, trained, used and judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, get_args, get_type_hints

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["E", "Example", "Model", "Prediction", "Task"]

Prediction: TypeAlias = "dict[str, Any]"
"""What a model says of one example, as JSON: a line of what `predict` writes."""


class Example(Protocol):
    """One of a task's training examples, questions, sentences ..."""

    @property
    def place(self) -> str:
        """Where it stands, such as "train.tsv:17", for messages."""

    @property
    def key(self) -> str:
        """What a held-out part is drawn by: examples with the same key are never divided."""


E = TypeVar("E", bound=Example)


@dataclass(frozen=True)
class Model:
    """A model with what reads its texts.

    Attributes:
        module: a transformers model, a SentenceTransformer or a CrossEncoder.
        tokenizer: transformers' fast tokenizer of it.
    """

    module: nn.Module
    tokenizer: Any


@dataclass(frozen=True, kw_only=True)
class Task(ABC, Generic[E]):
    """One of the tasks. Its fields are its settings, all of them JSON, which stay with the model that it trains.

    Attributes:
        name: of the command.
        pipeline: the hub's name for such models.
        library: that loads the result.
        parts: fields of a .jsonl file that a bare text, or a tuple of texts, stands for in Python.
        training: values of Training that fit the task better than the defaults.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    library: ClassVar[str] = "transformers"
    parts: ClassVar[tuple[str, ...]] = ("text", "pair")
    training: ClassVar[dict[str, Any]] = {}

    @property
    @abstractmethod
    def best(self) -> str:
        """The measure that chooses the best checkpoint, the higher the better."""

    # ---- data ----

    @abstractmethod
    def read(self, file: Path, *, is_labelled: bool = True) -> list[E]:
        """The examples of a file, in its order.

        Args:
            file: in one of the layouts of the task; for some tasks a folder.
            is_labelled: whether what is to be predicted must be there; if not, it may be missing.

        Raises:
            DataError: the file's first fault, with its line.
            OSError: it cannot be opened.
        """

    def fitted(self, examples: Sequence[E]) -> Self:  # noqa: ARG002
        """The task with what the training examples tell it, such as the names of the labels.

        Raises:
            DataError: nothing can be learnt from them.
        """
        return self

    def check(self, examples: Sequence[E], *, is_labelled: bool = True) -> None:
        """Compares examples with what was learnt from the training examples.

        Args:
            examples: for evaluation or prediction.
            is_labelled: whether what is to be predicted must be known of each; where it is known it is compared anyway.

        Raises:
            DataError: they do not go with it, such as a label that was not there.
        """

    # ---- model ----

    @abstractmethod
    def build(self, source: str) -> Model:
        """A model to be fine-tuned, with a new head where the task needs one, not yet swapped.

        Args:
            source: a folder or, with a network, a name on the Hugging Face hub.

        Raises:
            OSError, ValueError: transformers' own, where there is no such model.
        """

    @abstractmethod
    def load(self, folder: str) -> Model:
        """A model that was fine-tuned for the task, here or elsewhere, in evaluation mode, not yet swapped."""

    @abstractmethod
    def trainer(self, model: Model, examples: Sequence[E], arguments: dict[str, Any]) -> Any:
        """A Trainer of transformers or of sentence-transformers, made Judged (see loop), that trains on the examples.

        Args:
            model: from build, swapped.
            examples: for training.
            arguments: see loop.arguments.
        """

    def save(self, trainer: Any, folder: Path) -> None:
        """Writes the model and its tokenizer, as transformers or sentence-transformers load them."""
        trainer.save_model(str(folder))

    def of_model(self, model: Model) -> Self:  # noqa: ARG002
        """The task with what a loaded model tells it, for models that were fine-tuned elsewhere."""
        return self

    # ---- use ----

    @abstractmethod
    def predict(self, model: Model, examples: Sequence[E], tokens_per_batch: int) -> list[Prediction]:
        """What the model says of each example, in their order. Leaves the model in the mode that it was in."""

    @abstractmethod
    def measure(self, examples: Sequence[E], predictions: Sequence[Prediction]) -> dict[str, float]:
        """How right the predictions are: finite numbers by name, `best` among them."""

    def plot(self, examples: Sequence[E], predictions: Sequence[Prediction], folder: Path) -> list[Path]:  # noqa: ARG002
        """Draws what is to be seen in the predictions; the PNG files in `folder`, which exists."""
        return []

    # ---- record ----

    def settings(self) -> dict[str, Any]:
        """The fields, as JSON."""
        return asdict(self)

    @classmethod
    def of_settings(cls, settings: dict[str, Any]) -> Self:
        """The task with these fields.

        Raises:
            ValueError: a field is unknown or its value is not allowed.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"{cls.name} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
        hints = get_type_hints(cls)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        for name, value in values.items():
            _check_kind(name, value, hints[name])
        return cls(**values)


PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Compares a value with the type of its field where that is one of PLAIN, or one of them or None."""
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if len(kinds) != 1 or kinds[0] not in PLAIN or (value is None and type(None) in get_args(hint)):
        return
    taken = {float: (int, float)}.get(kinds[0], (kinds[0],))
    if type(value) not in taken:
        raise ValueError(f"{name} is {value!r}; {PLAIN[kinds[0]]} is needed")

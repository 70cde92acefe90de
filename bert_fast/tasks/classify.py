"""Texts, or pairs of texts, into classes, several classes at once, or numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from . import hugging_face
from .data.problems import DataError
from .data.tables import Role, Row, kind_of, number_in, read_table, text_in
from .measures import class_measures, multi_label_measures, number_measures
from .plots import draw_confusion, draw_scores
from .settings import at_least, one_of
from .task import Model, Prediction, Task

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Classify", "Kind", "Text"]

Kind = Literal["single", "multi", "number"]

ROLES = (
    Role(
        "text",
        ("sentence", "sentence1", "text1", "question", "question1", "premise", "query", "review"),
        has_one_name=True,
    ),
    Role("pair", ("sentence2", "text2", "question2", "hypothesis", "passage"), is_required=False),
)
LABEL = (
    *("labels", "category", "class", "intent", "target", "score", "sentiment", "gold_label", "is_duplicate"),
    *("similarity", "rating"),
)

SEPARATOR = ","  # between the labels of a text in .tsv and .csv
MOST_CLASSES = 2000


@dataclass(frozen=True)
class Text:
    """
    Attributes:
        place: where it stands.
        text: the first or only text.
        pair: the second text.
        label: a class, several of them, or a number; None: not known.
    """

    place: str
    text: str
    pair: str | None
    label: str | tuple[str, ...] | float | None

    @property
    def key(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Classify(Task[Text]):
    """
    Attributes:
        kind: "single": one class of a text; "multi": any number of classes, divided by commas or, in .jsonl, in a list;
            "number": regression.
        columns: see data.tables.read_table; roles are text, pair and label.
        labels: the classes in the order of the model's logits; where none are given, those of the training examples,
            numbers by their size before names by the alphabet.
        has_pairs: whether there are second texts; learnt from the training examples, None where that is not known.
        max_length: tokens of the longest text; None: what the model takes.
        class_weights: "balanced" weighs a class by the inverse of its frequency.
        threshold: of the probability of a class in "multi".
    """

    name: ClassVar[str] = "classify"
    pipeline: ClassVar[str] = "text-classification"

    kind: Kind = "single"
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    has_pairs: bool | None = None
    max_length: int | None = None
    class_weights: Literal["none", "balanced"] = "none"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        one_of("kind", self.kind, Kind)
        one_of("class_weights", self.class_weights, Literal["none", "balanced"])
        if self.class_weights != "none" and self.kind != "single":
            raise ValueError(f"class_weights is {self.class_weights!r}, which needs kind 'single', not {self.kind!r}")
        if self.max_length is not None:
            at_least("max_length", self.max_length, 3)
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it must be between 0 and 1")
        names = {name for name in self.labels if isinstance(name, str)}
        if len(names) < max(len(self.labels), min(2, len(self.labels) * 2)):
            raise ValueError(f"labels are {self.labels}; there must be two strings or more, none of them twice")

    @property
    def best(self) -> str:
        return {"single": "accuracy", "multi": "f1_micro", "number": "spearman"}[self.kind]

    # ---- data ----

    def read(self, file: Path, *, is_labelled: bool = True) -> list[Text]:
        roles = (*ROLES, Role("label", LABEL)) if is_labelled else ROLES
        columns = {name: column for name, column in self.columns.items() if is_labelled or name != "label"}
        examples = [self._example(row) for row in read_table(file, roles, columns)]
        _check_pairs(examples, examples[0].pair is not None, "the rows before")
        return examples

    def _example(self, row: Row) -> Text:
        pair = text_in(row, "pair") if "pair" in row.values else None
        label = self._label(row) if "label" in row.values else None
        return Text(row.place, text_in(row, "text"), pair, label)

    def _label(self, row: Row) -> str | tuple[str, ...] | float:
        value = row.values["label"]
        if self.kind == "number":
            return number_in(row, "label")
        if self.kind == "multi":
            parts = value.split(SEPARATOR) if isinstance(value, str) else value
            if not isinstance(parts, list):
                row.refuse(f"label is {kind_of(value)}; a list of classes is needed")
            return tuple(dict.fromkeys(name for part in parts if (name := _class_name(row, part))))
        return _class_name(row, value) or row.refuse("label is empty")

    def fitted(self, examples: Sequence[Text]) -> Self:
        task = replace(self, has_pairs=examples[0].pair is not None)
        if self.kind == "number":
            return task
        if self.labels:
            task.check(examples)
            return task
        names = {name for example in examples for name in _names(example)}
        if len(names) < 2:
            raise DataError(f"the training examples have only the class {min(names, default=None)!r}; two are needed")
        are_numbers = self.kind == "single" and all(_natural(name)[0] == 0 for name in names)
        most = min(MOST_CLASSES, max(2, len(examples) // 2)) if are_numbers else MOST_CLASSES
        if len(names) > most:
            raise DataError(
                f"the training examples have {len(names)} classes in {len(examples)} texts, such as "
                f"{', '.join(sorted(names)[:3])}; numbers are learnt with kind 'number'"
            )
        return replace(task, labels=tuple(sorted(names, key=_natural)))

    def check(self, examples: Sequence[Text], *, is_labelled: bool = True) -> None:
        if self.has_pairs is not None:
            _check_pairs(examples, self.has_pairs, "the training examples")
        elif examples:
            _check_pairs(examples, examples[0].pair is not None, "the examples before")
        known = set(self.labels)
        for example in examples:
            if example.label is None and is_labelled:
                raise DataError(f"{example.place}: no label")
            for name in _names(example):
                if name not in known:
                    some = ", ".join(self.labels[:10]) + (" ..." if len(self.labels) > 10 else "")
                    raise DataError(f"{example.place}: class {name!r} is not among the model's: {some}")

    # ---- model ----

    def build(self, source: str) -> Model:
        kind = {"single": "single_label", "multi": "multi_label", "number": "regression"}[self.kind]
        config: dict[str, Any] = {"problem_type": kind if kind == "regression" else f"{kind}_classification"}
        if self.kind == "number":
            config["num_labels"] = 1
        else:
            config["id2label"] = dict(enumerate(self.labels))
            config["label2id"] = {name: index for index, name in enumerate(self.labels)}
        return hugging_face.load_model(
            "AutoModelForSequenceClassification", source, ignore_mismatched_sizes=True, **config
        )

    def load(self, folder: str) -> Model:
        return hugging_face.load_model("AutoModelForSequenceClassification", folder, is_whole=True)

    def of_model(self, model: Model) -> Self:
        """The task with the classes that a model from elsewhere names.

        Raises:
            ValueError: the model has another number of classes than the task.
        """
        config: Any = model.module.config
        count = 1 if self.kind == "number" else len(self.labels)
        if self.labels or self.kind == "number":
            if config.num_labels != count:
                raise ValueError(f"the model has {config.num_labels} outputs; the task is of {count}")
            return self
        if config.problem_type == "regression" or config.num_labels == 1:
            return replace(self, kind="number").of_model(model)
        kind: Kind = "multi" if config.problem_type == "multi_label_classification" else self.kind
        return replace(self, kind=kind, labels=tuple(config.id2label[index] for index in range(config.num_labels)))

    def trainer(self, model: Model, examples: Sequence[Text], arguments: dict[str, Any]) -> Any:
        import transformers

        rows = self._encode(model, examples)
        targets = self._targets(examples)
        for row, target in zip(rows, targets, strict=True):
            row["labels"] = target
        collator = transformers.DataCollatorWithPadding(model.tokenizer)
        loss = self._weighted_loss(targets) if self.class_weights == "balanced" else None
        return hugging_face.trainer(model, rows, arguments, collator, loss)

    def _targets(self, examples: Sequence[Text]) -> list[Any]:
        if self.kind == "number":
            return [float(example.label) for example in examples]  # type: ignore[arg-type]
        index = {name: number for number, name in enumerate(self.labels)}
        if self.kind == "single":
            return [index[str(example.label)] for example in examples]
        return [[float(name in _names(example)) for name in self.labels] for example in examples]

    def _weighted_loss(self, targets: Sequence[int]) -> Any:
        counts = Counter(targets)
        weights = torch.tensor([len(targets) / (len(counts) * max(1, counts[i])) for i in range(len(self.labels))])

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            # Over the texts of an optimizer step, whose weights are 1 on average in all training examples.
            logits = outputs["logits"].float()
            total = cross_entropy(logits, labels, weight=weights.to(logits.device), reduction="sum")
            return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

        return loss

    def _encode(self, model: Model, examples: Sequence[Text]) -> list[dict[str, Any]]:
        texts = [example.text for example in examples]
        pairs = [example.pair for example in examples if example.pair is not None] or None
        return hugging_face.encode(model, texts, pairs, hugging_face.longest(model, self.max_length))

    # ---- use ----

    def predict(self, model: Model, examples: Sequence[Text], tokens_per_batch: int) -> list[Prediction]:
        encoded = self._encode(model, examples)
        found: list[Prediction] = [{}] * len(examples)
        for indices, output in hugging_face.outputs(model, encoded, tokens_per_batch):
            logits = output.logits.float().cpu()
            for index, prediction in zip(indices, self._predictions(logits), strict=True):
                found[index] = prediction
        return found

    def _predictions(self, logits: Tensor) -> list[Prediction]:
        if self.kind == "number":
            return [{"score": value} for value in logits[:, 0].tolist()]
        shares = logits.softmax(-1) if self.kind == "single" else logits.sigmoid()
        result: list[Prediction] = []
        for row in shares.tolist():
            label: Any = self.labels[int(np.argmax(row))]
            if self.kind == "multi":
                label = [name for name, share in zip(self.labels, row, strict=True) if share >= self.threshold]
            result.append({"label": label, "scores": dict(zip(self.labels, row, strict=True))})
        return result

    def measure(self, examples: Sequence[Text], predictions: Sequence[Prediction]) -> dict[str, float]:
        if self.kind == "number":
            return number_measures([example.label for example in examples], [row["score"] for row in predictions])
        shares = np.array([[row["scores"][name] for name in self.labels] for row in predictions])
        if self.kind == "multi":
            return multi_label_measures(np.array(self._targets(examples)), shares, self.threshold)
        return class_measures(self._targets(examples), shares, self.labels)

    def plot(self, examples: Sequence[Text], predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        if self.kind == "number":
            truth = [float(example.label) for example in examples]  # type: ignore[arg-type]
            return [draw_scores(truth, [row["score"] for row in predictions], folder / "scores.png")]
        if self.kind == "multi":
            return []
        truth_names = [str(example.label) for example in examples]
        return [
            draw_confusion(truth_names, [row["label"] for row in predictions], self.labels, folder / "confusion.png")
        ]


def _check_pairs(examples: Sequence[Text], has_pairs: bool, others: str) -> None:
    for example in examples:
        if (example.pair is not None) != has_pairs:
            here, there = ("no second text", "have one") if has_pairs else ("a second text", "have none")
            raise DataError(f"{example.place}: {here}; {others} {there}")


def _class_name(row: Row, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, (list, dict)):
        row.refuse(f"label is {kind_of(value)}; one class is needed (kind 'multi' takes lists)")
    return str(value).strip()


def _names(example: Text) -> tuple[str, ...]:
    label = example.label
    return label if isinstance(label, tuple) else (label,) if isinstance(label, str) else ()


def _natural(name: str) -> tuple[int, float, str]:
    """Numbers by size before names, so that "10" comes after "9"."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (0, number, name) if math.isfinite(number) else (1, 0.0, name)

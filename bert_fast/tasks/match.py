"""Pairs of texts and how similar they are: two vectors and their cosine, or one model over both texts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import nn

from . import sentence_trainer
from .columns import in_one_forward
from .cross_encoders import HEAD, cross_scores, load_cross_encoder
from .data.problems import DataError
from .data.tables import Role, Row, number_in, read_table, text_in
from .embeddings import default_prompt, embed_texts, load_sentence_transformer
from .measures import number_measures
from .plots import draw_scores
from .settings import at_least, one_of
from .task import Model, Prediction, Task

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Kind", "Match", "Pair"]

Kind = Literal["bi", "cross"]
Loss = Literal["cosine", "cosent"]

ROLES = (
    Role("sentence1", ("text1", "text_a", "question1", "premise", "query", "anchor")),
    Role("sentence2", ("text2", "text_b", "question2", "hypothesis", "passage", "positive")),
)
SCORE = ("similarity", "similarity_score", "label", "is_duplicate", "target")


@dataclass(frozen=True)
class Pair:
    """
    Attributes:
        place: where it stands.
        sentence1: the first text.
        sentence2: the second text.
        score: how similar they are, on the data's scale; None: not known.
    """

    place: str
    sentence1: str
    sentence2: str
    score: float | None

    @property
    def key(self) -> str:
        return self.sentence1


@dataclass(frozen=True, kw_only=True)
class Match(Task[Pair]):
    """
    Attributes:
        kind: "bi": a SentenceTransformer, the cosine of whose two vectors counts; "cross": a CrossEncoder, which reads
            both texts together.
        loss: of "bi". "cosine": squared error of the cosine against the score, scaled to 0..1 (Reimers and Gurevych
            2019); "cosent": only the order of the scores counts (CoSENT). Of "cross" it is binary cross-entropy on the
            scaled score.
        columns: see data.tables.read_table; roles are sentence1, sentence2 and score.
        low: the score that means no similarity; None: the training examples' lowest, rounded down.
        high: the score that means sameness; None: the training examples' highest, rounded up.
        max_length: tokens of the longest text, of "cross" the longest pair; None: what the model takes.
    """

    name: ClassVar[str] = "match"
    pipeline: ClassVar[str] = "sentence-similarity"
    library: ClassVar[str] = "sentence-transformers"
    parts: ClassVar[tuple[str, ...]] = ("sentence1", "sentence2")
    training: ClassVar[dict[str, Any]] = {"epochs": 4, "batch_size": 16, "learning_rate": 2e-5}

    kind: Kind = "bi"
    loss: Loss = "cosine"
    columns: Mapping[str, str] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        one_of("kind", self.kind, Kind)
        one_of("loss", self.loss, Loss)
        if self.kind == "cross" and self.loss != "cosine":
            raise ValueError(f"loss is {self.loss!r}, which needs kind 'bi', not 'cross'")
        if self.low is not None and self.high is not None and not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low is {self.low}, high is {self.high}; low must be less than high")
        if self.max_length is not None:
            at_least("max_length", self.max_length, 3)

    @property
    def best(self) -> str:
        return "spearman"

    # ---- data ----

    def read(self, file: Path, *, is_labelled: bool = True) -> list[Pair]:
        roles = (*ROLES, Role("score", SCORE, is_labelled, is_labelled))
        return [_pair(row, is_labelled) for row in read_table(file, roles, self.columns)]

    def fitted(self, examples: Sequence[Pair]) -> Self:
        scores = [example.score for example in examples if example.score is not None]
        low = math.floor(min(scores)) if self.low is None else self.low
        high = math.ceil(max(scores)) if self.high is None else self.high
        if not low < high or min(scores) == max(scores):
            raise DataError(
                f"the training examples' scores are within {min(scores):g} and {max(scores):g}; two are needed"
            )
        task = replace(self, low=low, high=high)
        task.check(examples)
        return task

    def check(self, examples: Sequence[Pair], *, is_labelled: bool = True) -> None:
        for example in examples:
            if example.score is None and is_labelled:
                raise DataError(f"{example.place}: no score")
        if self.low is None or self.high is None:
            return
        for example in examples:
            if example.score is not None and not self.low <= example.score <= self.high:
                raise DataError(
                    f"{example.place}: score {example.score:g} is not within {self.low:g} and {self.high:g}, "
                    "the range of the training examples or of the settings low and high"
                )

    # ---- model ----

    def build(self, source: str) -> Model:
        if self.kind == "bi":
            return load_sentence_transformer(source, self.max_length)
        model = load_cross_encoder(source, self.max_length, is_new=True)
        model.module.activation_fn = nn.Sigmoid()  # whatever it had: the loss is on logits of a score within 0..1
        return model

    def load(self, folder: str) -> Model:
        is_cross = self.kind == "cross" or _holds_cross_encoder(Path(folder))
        return (load_cross_encoder if is_cross else load_sentence_transformer)(folder, self.max_length)

    def of_model(self, model: Model) -> Self:
        from sentence_transformers import CrossEncoder

        return replace(self, kind="cross" if isinstance(model.module, CrossEncoder) else "bi")

    def trainer(self, model: Model, examples: Sequence[Pair], arguments: dict[str, Any]) -> Any:
        low, width = self._scale()
        rows: dict[str, list[Any]] = {
            "sentence1": [example.sentence1 for example in examples],
            "sentence2": [example.sentence2 for example in examples],
            "label": [((example.score or 0.0) - low) / width for example in examples],
        }
        prompt = default_prompt(model.module)
        return sentence_trainer.trainer(model, rows, arguments, self._loss(model.module), prompts=prompt)

    def _loss(self, module: Any) -> nn.Module:
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
        from sentence_transformers.sentence_transformer.losses import CoSENTLoss, CosineSimilarityLoss

        if self.kind == "cross":
            return BinaryCrossEntropyLoss(module)  # type: ignore[no-any-return, unused-ignore]
        losses = {"cosine": CosineSimilarityLoss, "cosent": CoSENTLoss}
        return in_one_forward(losses[self.loss](module))

    def save(self, trainer: Any, folder: Path) -> None:
        sentence_trainer.save(trainer, folder)

    def _scale(self) -> tuple[float, float]:
        """The lowest score, and how far the highest is from it; 0 and 1 where they are not known."""
        low, high = self.low or 0.0, 1.0 if self.high is None else self.high
        return low, high - low

    # ---- use ----

    def predict(self, model: Model, examples: Sequence[Pair], tokens_per_batch: int) -> list[Prediction]:
        """The "cosine" of each pair or, of "cross", its "score", on the scale of the training examples."""
        if self.kind == "cross":
            pairs = [(example.sentence1, example.sentence2) for example in examples]
            low, width = self._scale()
            return [{"score": low + width * float(share)} for share in cross_scores(model, pairs, tokens_per_batch)]
        texts = list(dict.fromkeys(text for pair in examples for text in (pair.sentence1, pair.sentence2)))
        row = {text: number for number, text in enumerate(texts)}
        vectors = embed_texts(model, texts, tokens_per_batch)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        first = vectors[[row[pair.sentence1] for pair in examples]]
        second = vectors[[row[pair.sentence2] for pair in examples]]
        return [{"cosine": float(cosine)} for cosine in (first * second).sum(1)]

    def measure(self, examples: Sequence[Pair], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Correlations; of "cross" the errors too, as its scores are on the scale of the right ones."""
        measures = number_measures([example.score for example in examples], self._found(predictions))
        return {name: value for name, value in measures.items() if self.kind == "cross" or name not in ("mse", "mae")}

    def plot(self, examples: Sequence[Pair], predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        truth = [float(example.score) for example in examples]  # type: ignore[arg-type]
        return [draw_scores(truth, self._found(predictions), folder / "scores.png")]

    def _found(self, predictions: Sequence[Prediction]) -> list[float]:
        return [row["score" if self.kind == "cross" else "cosine"] for row in predictions]


def _pair(row: Row, is_labelled: bool) -> Pair:
    has_score = is_labelled or row.values.get("score") not in (None, "")
    score = number_in(row, "score") if has_score else None
    return Pair(row.place, text_in(row, "sentence1"), text_in(row, "sentence2"), score)


def _holds_cross_encoder(folder: Path) -> bool:
    """Whether a folder says that its model is a CrossEncoder, or has the head of one and no pooling."""
    if (file := folder / "config_sentence_transformers.json").is_file():
        return bool(json.loads(file.read_text(encoding="utf-8")).get("model_type") == "CrossEncoder")
    if (folder / "modules.json").is_file() or not (file := folder / "config.json").is_file():
        return False
    names = json.loads(file.read_text(encoding="utf-8")).get("architectures") or ()
    return any(name.endswith(HEAD) for name in names)

"""Answers to questions, as parts of a text (extractive question answering)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import Tensor

from . import hugging_face
from .answers import answer_measures, best_spans
from .context_windows import CLS, Cut, Window, contexts_of, cut_windows
from .data.problems import DataError
from .data.squad import Question, Reading, read_questions
from .settings import at_least
from .task import Model, Prediction, Task

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Answer", "Question"]

AUTO_CLASS = "AutoModelForQuestionAnswering"
WINDOW = 384  # Devlin et al. 2018

Found: TypeAlias = tuple[float, int, int]  # score, and the characters where a span begins and ends


@dataclass(frozen=True, kw_only=True)
class Answer(Task[Question]):
    """
    Attributes:
        columns: of .jsonl; see data.squad.Reading, also for the next two.
        fix_starts: whether answers that do not stand where they should are looked for nearby.
        empty_is_impossible: whether an empty list of answers says that there is none.
        has_impossible: whether the context may lack the answer, as in SQuAD 2.0; learnt from the training examples.
        max_length: tokens of a window; None: 384, or what the model takes if that is less.
        stride: tokens of the context that neighbouring windows share.
        longest_question: tokens of a question, beyond which it is cut.
        longest_answer: tokens of an answer that is looked for.
        n_best: answers of each question that a prediction has.
        null_threshold: with has_impossible, a question is answered unless the score of "no answer" exceeds that of the
            best answer by more.
    """

    name: ClassVar[str] = "qa"
    pipeline: ClassVar[str] = "question-answering"
    parts: ClassVar[tuple[str, ...]] = ("question", "context")

    columns: Mapping[str, str] = field(default_factory=dict)
    fix_starts: bool = False
    empty_is_impossible: bool = False
    has_impossible: bool = False
    max_length: int | None = None
    stride: int = 128
    longest_question: int = 64
    longest_answer: int = 30
    n_best: int = 20
    null_threshold: float = 0.0

    def __post_init__(self) -> None:
        at_least("stride", self.stride, 0)
        for name in ("longest_question", "longest_answer", "n_best"):
            at_least(name, getattr(self, name), 1)
        if not abs(self.null_threshold) < float("inf"):
            raise ValueError(f"null_threshold is {self.null_threshold}; it must be a finite number")

    @property
    def best(self) -> str:
        return "f1"

    # ---- data ----

    def read(self, file: Path, *, is_labelled: bool = True) -> list[Question]:
        reading = Reading(
            is_labelled=is_labelled,
            columns=self.columns,
            fix_starts=self.fix_starts,
            empty_is_impossible=self.empty_is_impossible,
        )
        return read_questions(file, reading)

    def fitted(self, examples: Sequence[Question]) -> Self:
        if not any(example.answers for example in examples):
            raise DataError("none of the training examples has an answer")
        return replace(self, has_impossible=self.has_impossible or any(not example.answers for example in examples))

    def check(self, examples: Sequence[Question], *, is_labelled: bool = True) -> None:
        for example in examples:
            if example.answers is None and not is_labelled:
                continue
            if example.answers is None:
                raise DataError(f"{example.place}: no answers to compare with")
            if not example.answers and not self.has_impossible:
                raise DataError(
                    f"{example.place}: a question without an answer; the model was trained to answer all of them "
                    "(the setting has_impossible allows it not to)"
                )

    # ---- model ----

    def build(self, source: str) -> Model:
        return hugging_face.load_model(AUTO_CLASS, source, ignore_mismatched_sizes=True, num_labels=2)

    def load(self, folder: str) -> Model:
        model = hugging_face.load_model(AUTO_CLASS, folder)
        config: Any = model.module.config
        names = config.architectures or []
        if not any("ForQuestionAnswering" in name for name in names):
            raise ValueError(
                f"{folder} holds {', '.join(names) or 'a model without a name'}, which answers no questions"
            )
        return model

    def trainer(self, model: Model, examples: Sequence[Question], arguments: dict[str, Any]) -> Any:
        import transformers

        rows = []
        for window in self._windows(model, examples):
            answers = examples[window.question].answers
            start, end = window.positions(answers[0]) if answers else (CLS, CLS)
            rows.append({**window.inputs, "start_positions": start, "end_positions": end})
        # Steps were counted for as many rows as questions.
        steps = round(arguments["warmup_steps"] * len(rows) / len(examples))
        collator = transformers.DataCollatorWithPadding(model.tokenizer)
        return hugging_face.trainer(model, rows, {**arguments, "warmup_steps": steps}, collator)

    def _windows(self, model: Model, examples: Sequence[Question]) -> list[Window]:
        length = hugging_face.longest(model, self.max_length)
        cut = Cut(
            window=length if self.max_length else min(WINDOW, length),
            shared=self.stride,
            question=self.longest_question,
        )
        questions = [example.question for example in examples]
        return list(cut_windows(model.tokenizer, questions, [example.context for example in examples], cut))

    # ---- use ----

    def predict(self, model: Model, examples: Sequence[Question], tokens_per_batch: int) -> list[Prediction]:
        windows = self._windows(model, examples)
        found: list[list[Found]] = [[] for _ in examples]
        null_scores = [float("inf")] * len(examples)
        for indices, output in hugging_face.outputs(model, [window.inputs for window in windows], tokens_per_batch):
            batch = [windows[index] for index in indices]
            starts, ends = output.start_logits.float(), output.end_logits.float()
            is_context = contexts_of(batch, starts.shape[1]).to(starts.device)
            spans = [part.cpu() for part in best_spans(starts, ends, is_context, self.longest_answer, self.n_best)]
            nulls = (starts[:, CLS] + ends[:, CLS]).tolist()
            for window, null, *parts in zip(batch, nulls, *spans, strict=True):
                null_scores[window.question] = min(null, null_scores[window.question])
                found[window.question] += _in_characters(window, *parts)
        return [self._prediction(*parts) for parts in zip(examples, found, null_scores, strict=True)]

    def _prediction(self, example: Question, found: list[Found], null_score: float) -> Prediction:
        n_best: dict[tuple[int, int], Prediction] = {}
        for score, begin, end in sorted(found, key=lambda span: (-span[0], *span[1:])):
            text = example.context[begin:end]
            begin, end = begin + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            if begin < end and len(n_best) < self.n_best:
                n_best.setdefault((begin, end), {"text": text.strip(), "start": begin, "end": end, "score": score})
        answers = list(n_best.values())
        null = {"text": "", "start": None, "end": None, "score": null_score}
        is_silent = not answers or (self.has_impossible and null_score - answers[0]["score"] > self.null_threshold)
        said = null if is_silent else answers[0]
        return {"id": example.id, **said, "null_score": null_score, "n_best": answers}

    def measure(self, examples: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        answers = [[answer.text for answer in example.answers or ()] for example in examples]
        return answer_measures(answers, predictions, has_impossible=self.has_impossible)


def _in_characters(window: Window, scores: Tensor, first: Tensor, last: Tensor) -> list[Found]:
    count = int(scores.isfinite().sum())  # the others are none
    begins = window.offsets[first[:count].numpy() - window.first, 0]
    ends = window.offsets[last[:count].numpy() - window.first, 1]
    return list(zip(scores[:count].tolist(), begins.tolist(), ends.tolist(), strict=True))

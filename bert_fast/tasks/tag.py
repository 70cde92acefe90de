"""Words into labels: named entities, parts of speech and the like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..lines import bare_suffix
from . import hugging_face
from .data.conll import read_columns
from .data.problems import DataError, bad_line
from .data.sentences import Sentence, Words, read_json_lines, read_texts
from .plots import draw_confusion
from .schemes import entities, is_tag, kinds_of, recognise, recognise_names, repaired, tags
from .settings import at_least, one_of
from .tag_measures import entity_measures, label_measures
from .task import Model, Prediction, Task
from .word_windows import Window, make_windows

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Tag"]

SchemeName = Literal["auto", "none", "IOB1", "IOB2", "BIOES", "BILOU"]

OTHERS = (".json", ".csv", ".parquet", ".arrow")
MOST_LABELS = 2000


@dataclass(frozen=True, kw_only=True)
class Tag(Task[Sentence]):
    """Each word of a sentence gets a label, by the first piece of it (Devlin et al. 2018, section 5.3).

    Files are .jsonl with {"tokens": [...], "labels": [...]}, or columns (data.conll.read_columns). Without labels,
    .jsonl may hold {"text": "..."} instead, and .txt is plain text with a sentence on each line.

    A prediction has "tokens"; "labels", as the model gives them, whatever follows what; "scores", the probability of
    each label; and "entities", those that the scheme has in the labels (schemes.entities), each with "type", "text",
    "start", "end" (exclusive) and "score", the mean of its words'. Start and end count characters of the text where a
    text was given, and words where words were given. A word of which the tokenizer leaves nothing, such as a control
    character, has the label `fallback` with the score 0.

    Attributes:
        scheme: of the labels: "IOB1", "IOB2" (BIO), "BIOES", "BILOU", or "none" for labels that are no parts of
            entities, such as parts of speech; "auto": recognised from the training labels (schemes.recognise).
        repair: whether a tag that cannot follow what is before it becomes a beginning (schemes.repaired); if not, it is
            refused with its line.
        token_column: of the words in columns, from 1.
        label_column: of the labels, from 1, or from the end: -1 is the last.
        columns: in .jsonl, other names of tokens, labels and text.
        words: how texts without labels are cut; see data.sentences.words_of.
        labels: in the order of the model's logits; learnt from the training examples: O and all tags of their types.
        fallback: O, or without a scheme the most frequent label; learnt too.
        max_length: tokens of a window; None: what the model takes.
        stride: pieces that windows of a long sentence have in common; None: a quarter of a window. see word_windows.
    """

    name: ClassVar[str] = "tag"
    pipeline: ClassVar[str] = "token-classification"
    parts: ClassVar[tuple[str, ...]] = ("text",)

    scheme: SchemeName = "auto"
    repair: bool = False
    token_column: int = 1
    label_column: int = -1
    columns: Mapping[str, str] = field(default_factory=dict)
    words: Words = "blanks"
    labels: tuple[str, ...] = ()
    fallback: str = ""
    max_length: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        one_of("scheme", self.scheme, SchemeName)
        one_of("words", self.words, Words)
        at_least("token_column", self.token_column, 1)
        if self.label_column == 0:
            raise ValueError("label_column is 0; it must be from 1 on, or negative from the end")
        if self.max_length is not None:
            at_least("max_length", self.max_length, 3)
        if self.stride is not None:
            at_least("stride", self.stride, 0)

    @property
    def best(self) -> str:
        return "accuracy" if self.scheme == "none" else "f1"

    # ---- data ----

    def read(self, file: Path, *, is_labelled: bool = True) -> list[Sentence]:
        suffix = bare_suffix(file)
        if suffix in OTHERS:
            raise bad_line(file, None, f"{suffix} is not read; .jsonl or columns, such as .conll, are needed")
        if suffix == ".jsonl":
            return list(read_json_lines(file, self.columns, self.words, is_labelled=is_labelled))
        if suffix == ".txt" and not is_labelled:
            return list(read_texts(file, self.words))
        return list(read_columns(file, self.token_column, self.label_column if is_labelled else None))

    def fitted(self, examples: Sequence[Sentence]) -> Self:
        counts = Counter(label for example in examples for label in _labels(example))
        scheme: Any = recognise(map(_labels, examples)) if self.scheme == "auto" else self.scheme
        task = replace(self, scheme=scheme)
        for example in examples:
            task._check_tags(example)
        if scheme == "none":
            return replace(task, labels=_plain(counts), fallback=min(counts, key=lambda name: (-counts[name], name)))
        kinds = kinds_of(counts)
        if not kinds:
            raise DataError(f"{examples[0].place}: the training examples have no entity, only the label 'O'")
        return replace(task, labels=tags(kinds, scheme), fallback="O")

    def check(self, examples: Sequence[Sentence], *, is_labelled: bool = True) -> None:
        known = set(self.labels)
        for example in examples:
            if example.labels is None and not is_labelled:
                continue
            self._check_tags(example)
            for word, label in enumerate(_labels(example)):
                if label not in known:
                    some = ", ".join(self.labels[:10]) + (" ..." if len(self.labels) > 10 else "")
                    example.refuse(word, f"label {label!r} is not among the model's: {some}")

    def _check_tags(self, example: Sentence) -> None:
        """
        Raises:
            DataError: a label is no tag of the scheme, or one that cannot stand where it does.
        """
        if self.scheme == "none":
            return
        labels = _labels(example)
        for word, label in enumerate(labels):
            if not is_tag(label, self.scheme):
                example.refuse(word, f"label {label!r} is no tag of {self.scheme}")
        for word, right in enumerate(() if self.repair else repaired(labels, self.scheme)):
            if labels[word] != right:
                before = labels[word - 1] if word else "the beginning"
                after = labels[word + 1] if word + 1 < len(labels) else "the end"
                reason = f"label {labels[word]!r} between {before} and {after} is impossible in {self.scheme}"
                example.refuse(word, f"{reason}; repair would make it {right!r}")

    def _truth(self, example: Sentence) -> list[str]:
        labels = _labels(example)
        return repaired(labels, self.scheme) if self.repair and self.scheme != "none" else list(labels)

    # ---- model ----

    def build(self, source: str) -> Model:
        model = hugging_face.load_model(
            "AutoModelForTokenClassification",
            source,
            ignore_mismatched_sizes=True,
            id2label=dict(enumerate(self.labels)),
            label2id={name: index for index, name in enumerate(self.labels)},
        )
        return Model(model.module, _with_blanks(model.tokenizer, source))

    def load(self, folder: str) -> Model:
        return hugging_face.load_model("AutoModelForTokenClassification", folder, is_whole=True)

    def of_model(self, model: Model) -> Self:
        """The task with the labels that a model from elsewhere names.

        With the scheme "auto" their names tell it (schemes.recognise_names); as they do not tell IOB1 with B from IOB2,
        IOB1 must be named. `fallback` is O, or the first label where there is no O.
        """
        if self.labels:
            return self
        config: Any = model.module.config
        labels = tuple(config.id2label[index] for index in range(config.num_labels))
        scheme: Any = recognise_names(labels) if self.scheme == "auto" else self.scheme
        return replace(self, scheme=scheme, labels=labels, fallback="O" if "O" in labels else labels[0])

    def trainer(self, model: Model, examples: Sequence[Sentence], arguments: dict[str, Any]) -> Any:
        """See Task; a word is labelled in one window alone, as in use, so that all words weigh the same in the loss."""
        import transformers

        index = {name: number for number, name in enumerate(self.labels)}
        truth = [self._truth(example) for example in examples]
        rows: list[dict[str, Any]] = []
        for window in self._windows(model, examples):
            targets = [-100] * len(window.row["input_ids"])
            for word, place in window.owned.items():
                targets[place] = index[truth[window.sentence][word]]
            rows.append({**window.row, "labels": targets})
        if not rows:
            raise DataError(f"{examples[0].place}: the tokenizer leaves nothing of any training example")
        collator = transformers.DataCollatorForTokenClassification(model.tokenizer)
        return hugging_face.trainer(model, rows, arguments, collator)

    def _windows(self, model: Model, examples: Sequence[Sentence]) -> list[Window]:
        model.tokenizer.padding_side = "right"  # a window knows its words by their places from the left
        longest = hugging_face.longest(model, self.max_length)
        return make_windows(model.tokenizer, [example.tokens for example in examples], longest, self.stride)

    # ---- use ----

    def predict(self, model: Model, examples: Sequence[Sentence], tokens_per_batch: int) -> list[Prediction]:
        windows = self._windows(model, examples)
        found = [[(self.fallback, 0.0)] * len(example.tokens) for example in examples]
        for indices, output in hugging_face.outputs(model, [window.row for window in windows], tokens_per_batch):
            shares, numbers = output.logits.float().softmax(-1).max(-1)
            for window, row, best in zip(
                map(windows.__getitem__, indices), shares.tolist(), numbers.tolist(), strict=True
            ):
                for word, place in window.owned.items():
                    found[window.sentence][word] = self.labels[best[place]], row[place]
        return [self._prediction(example, words) for example, words in zip(examples, found, strict=True)]

    def _prediction(self, example: Sentence, found: Sequence[tuple[str, float]]) -> Prediction:
        labels, scores = (list(values) for values in zip(*found, strict=True))
        spans = [] if self.scheme == "none" else entities(labels, self.scheme)
        named = [
            {"type": kind, **_extent(example, start, end), "score": sum(scores[start:end]) / (end - start)}
            for kind, start, end in spans
        ]
        return {"tokens": list(example.tokens), "labels": labels, "scores": scores, "entities": named}

    def measure(self, examples: Sequence[Sentence], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Accuracy of words, and with a scheme tag_measures.entity_measures, without one macro F1 of the labels."""
        truth = [self._truth(example) for example in examples]
        found = [prediction["labels"] for prediction in predictions]
        if self.scheme == "none":
            return label_measures(truth, found)
        return entity_measures(truth, found, self.scheme)

    def plot(self, examples: Sequence[Sentence], predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        truth = [label for example in examples for label in self._truth(example)]
        found = [label for prediction in predictions for label in prediction["labels"]]
        return [draw_confusion(truth, found, self.labels, folder / "confusion.png")]


def _labels(example: Sentence) -> tuple[str, ...]:
    if example.labels is None:
        raise DataError(f"{example.place}: no labels")
    return example.labels


def _plain(counts: Counter[str]) -> tuple[str, ...]:
    words = counts.total()
    if len(counts) < 2:
        raise DataError(f"the training examples have only the label {min(counts)!r}; two are needed")
    if len(counts) > min(MOST_LABELS, max(2, words // 2)):
        raise DataError(
            f"the training examples have {len(counts)} labels of {words} words, such as "
            f"{', '.join(sorted(counts)[:3])}; label_column says where labels are"
        )
    return tuple(sorted(counts))


def _extent(example: Sentence, start: int, end: int) -> dict[str, Any]:
    """An entity's text and place, in characters where there is a text, otherwise in words."""
    if example.text is None:
        return {"text": " ".join(example.tokens[start:end]), "start": start, "end": end}
    first, last = example.spans[start][0], example.spans[end - 1][1]
    return {"text": example.text[first:last], "start": first, "end": last}


def _with_blanks(tokenizer: Any, source: str) -> Any:
    """The tokenizer; one on bytes, such as RoBERTa's, made to read each word as one after a blank.

    Words apart have none, and without it their pieces are those of the middle of words.
    """
    import transformers

    if getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", True):
        return tokenizer
    with hugging_face.quiet():
        changed = transformers.AutoTokenizer.from_pretrained(
            source, local_files_only=Path(source).is_dir(), add_prefix_space=True
        )
    changed.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    return changed

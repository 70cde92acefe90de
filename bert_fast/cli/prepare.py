"""bert-fast pretrain prepare: a corpus from texts, and its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
from rich import box
from rich.console import Console
from rich.progress import Progress as Display
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bert_fast.pretraining import prepare as preparation
from bert_fast.pretraining import vocabulary as vocabularies
from bert_fast.pretraining.corpus import CorpusError, OnProblem, Problem, documents_of, find_files, read_documents
from bert_fast.pretraining.corpus import refuse as refuse_problem
from bert_fast.pretraining.shards import STARTED, write_atomically
from bert_fast.pretraining.vocabulary import Vocabulary

from .lines import say

MEGABYTE = 10**6
SHOWN = 20  # problems that are listed
TRAINED = "training.json"  # beside a vocabulary: how it was trained

PARTS: dict[str, str] = {"train": "training", "held_out": "held out"}


class NoTextError(click.ClickException):
    """A corpus without text: exit status 1."""


# ---- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """What a corpus is made of.

    Attributes:
        sources: files, or a data set.
        field: key or column of the text.
    """

    sources: list[Path] | Iterable[dict[str, Any]]
    field: str

    def streams(self, on_problem: OnProblem) -> list[Iterator[list[str]]]:
        """The documents of each file, or of the data set."""
        if isinstance(self.sources, list):
            return [read_documents(file, field=self.field, on_problem=on_problem) for file in self.sources]
        return [documents_of(self.sources, field=self.field, on_problem=on_problem)]

    def check(self) -> None:
        """Reads up to the first document.

        Raises:
            NoTextError: there is none.
        """
        problems = Problems()
        if all(next(stream, None) is None for stream in self.streams(problems)):
            raise NoTextError(f"the corpus has no text; {problems.count} problems, the first: {problems.first[0]}")

    def sample(self, megabytes: int, on_problem: OnProblem) -> Iterator[list[str]]:
        """Documents of about so many megabytes, from the beginnings of all files alike."""
        streams = self.streams(on_problem)
        room = megabytes * MEGABYTE
        for number, stream in enumerate(streams):
            share = room // (len(streams) - number)
            for document in stream:
                if share <= 0:
                    break
                yield document
                size = sum(len(line.encode()) for line in document)
                share, room = share - size, room - size


def open_files(paths: Sequence[str], field: str) -> Texts:
    """Files, and those in folders.

    Raises:
        CorpusError: see find_files.
    """
    return Texts(find_files(paths), field)


def open_dataset(name: str, configuration: str | None, split: str, field: str) -> Texts:
    """A data set of Hugging Face, as a stream.

    Raises:
        CorpusError: it has no such field.
        OSError, ValueError: there is no such data set, configuration or split.
    """
    from datasets import load_dataset  # type: ignore[import-untyped, unused-ignore]

    rows: Any = load_dataset(name, configuration, split=split, streaming=True)
    names = rows.column_names
    if names and field not in names:
        raise CorpusError(f"--field is {field!r}; {name} has {', '.join(map(repr, names))}")
    return Texts(rows, field)


@dataclass
class Problems:
    """Counts problems and keeps the first ones."""

    first: list[Problem] = field(default_factory=list)
    count: int = 0

    def __call__(self, problem: Problem) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(problem)


# ---- vocabulary ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How a vocabulary is trained.

    Attributes:
        size: entries at most.
        is_cased: whether upper case and accents stay.
        megabytes: of text that it is trained on.
    """

    size: int
    is_cased: bool
    megabytes: int

    def __call__(self, texts: Texts, on_problem: OnProblem) -> Vocabulary:
        documents = texts.sample(self.megabytes, on_problem)
        return vocabularies.train(documents, size=self.size, lowercase=not self.is_cased)

    def find(self, out: Path) -> Vocabulary | None:
        """The vocabulary that an interrupted preparation has trained like this; None: there is none."""
        try:
            record = json.loads((out / "vocabulary" / TRAINED).read_text(encoding="utf-8"))
            found = vocabularies.load(out / "vocabulary")
        except (OSError, ValueError):
            return None
        return found if record == self._record(found) else None

    def keep(self, out: Path, vocabulary: Vocabulary) -> None:
        """Notes beside the vocabulary, which the preparation has written, how it was trained.

        A preparation begins in an empty folder, so that this comes after its first chunk. Without a note the vocabulary
        is trained again, with the same result.
        """
        write_atomically(out / "vocabulary" / TRAINED, json.dumps(self._record(vocabulary)) + "\n")

    def _record(self, vocabulary: Vocabulary) -> dict[str, Any]:
        return {**asdict(self), "fingerprint": vocabulary.fingerprint}


# ---- the corpus ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What prepare is told besides the texts and the vocabulary; see bert_fast.pretraining.prepare."""

    sentences: Literal["lines", "split"]
    held_out: float
    shard_bytes: int
    workers: int | None


def prepare(
    console: Console, out: Path, texts: Texts, vocabulary: Path | Training, options: Options, *, is_refusing: bool
) -> None:
    """Makes a corpus and says what is in it.

    Args:
        console: where it tells how it goes.
        out: folder of the corpus.
        texts: of the corpus.
        vocabulary: where it is, or how it is trained.
        options: see Options.
        is_refusing: whether a problem with the texts is an error; else it is skipped and listed.

    Raises:
        NoTextError: there is no text.
        CorpusError, ValueError, OSError: see bert_fast.pretraining.prepare and vocabulary.load.
        SystemExit: 130, after Ctrl-C.
    """
    _check_folder(out)
    texts.check()
    problems = Problems()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    last = None
    try:
        with Display(*columns, console=console, transient=True) as display:
            task = display.add_task("reading the vocabulary", total=None)
            if isinstance(vocabulary, Training):
                display.update(task, description="training the vocabulary")
            entries = _entries(vocabulary, out, texts, is_refusing=is_refusing)
            display.update(task, description="preparing")

            def show(progress: preparation.Progress) -> None:
                nonlocal last
                last = progress
                display.update(task, description=_figures(progress))
                if isinstance(vocabulary, Training) and progress.chunks == 1:
                    vocabulary.keep(out, entries)

            prepared = preparation.prepare(
                out,
                sources=texts.sources,
                vocabulary=entries,
                field=texts.field,
                on_problem=refuse_problem if is_refusing else problems,
                progress=show,
                **asdict(options),
            )
    except KeyboardInterrupt:
        say(console, "stopped; the same command goes on from here")
        raise SystemExit(130) from None
    except RuntimeError as error:  # another process is at it, or a worker was killed
        raise CorpusError(str(error)) from None
    _summarise(console, prepared, entries, problems, last)


def _entries(vocabulary: Path | Training, out: Path, texts: Texts, *, is_refusing: bool) -> Vocabulary:
    if not isinstance(vocabulary, Training):
        return vocabularies.load(vocabulary)
    # What is skipped here is met again.
    on_problem = refuse_problem if is_refusing else Problems()
    return vocabulary.find(out) or vocabulary(texts, on_problem)


def _check_folder(out: Path) -> None:
    """Refuses before a vocabulary is trained what the preparation would refuse after it."""
    others = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
    if others and STARTED not in others:
        raise CorpusError(f"{out} holds {others[0]} and no preparation; a new or empty folder is needed")


def _figures(progress: preparation.Progress) -> str:
    rate = progress.tokens / max(progress.seconds, 1e-9)
    return f"{progress.bytes_read / MEGABYTE:,.1f} MB  {progress.tokens:,} tokens  {rate:,.0f} tokens/s"


def _summarise(
    console: Console,
    prepared: preparation.Prepared,
    vocabulary: Vocabulary,
    problems: Problems,
    progress: preparation.Progress | None,
) -> None:
    """Tables of the corpus, and what was skipped. Of a corpus that was ready no texts were read: no progress."""
    if prepared.problems:
        say(console, f"{prepared.problems:,} problems, which were skipped:")
        for problem in problems.first:
            say(console, f"  {problem}")
        if prepared.problems > len(problems.first):
            say(console, f"  and {prepared.problems - len(problems.first):,} more")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("documents", "sentences", "tokens"):
        table.add_column(name, justify="right")
    for part, totals in prepared.totals.items():
        table.add_row(PARTS[part], *(f"{totals[name]:,}" for name in ("documents", "sentences", "tokens")))
    console.print(table)
    speed = "; it was ready already"
    if progress is not None:
        speed = f", {progress.bytes_read / MEGABYTE / max(prepared.seconds, 1e-9):,.1f} MB/s"
    say(console, f"vocabulary of {vocabulary.size:,} entries; {prepared.seconds:,.1f} s{speed}")
    say(console, f"corpus in {prepared.folder}")

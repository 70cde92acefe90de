"""The commands of fine-tuning, one a task, and their options; the work is in finetune.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from rich.console import Console

from bert_fast.tasks.classify import Classify, Kind
from bert_fast.tasks.data.sentences import Words
from bert_fast.tasks.match import Kind as MatchKind
from bert_fast.tasks.match import Loss, Match
from bert_fast.tasks.qa import Answer
from bert_fast.tasks.retrieve import Retrieve
from bert_fast.tasks.settings import Precision, Training
from bert_fast.tasks.tag import SchemeName, Tag
from bert_fast.tasks.task import Task

from .options import PATH, found_device_option, need, one_line

Command = TypeVar("Command", bound=Callable[..., Any])

NEW_FOLDER = click.Path(file_okay=False, path_type=Path)

TRAINING: dict[str, tuple[Any, str]] = {
    "epochs": (click.FloatRange(0, min_open=True), "Passes over the training examples."),
    "batch_size": (click.IntRange(1), "Examples of a batch."),
    "accumulation": (click.IntRange(1), "Batches of an optimizer step."),
    "learning_rate": (click.FloatRange(0, min_open=True), "Of AdamW, its highest value."),
    "warmup": (click.FloatRange(0, 1), "Share of the steps in which it rises; then it falls to 0."),
    "weight_decay": (click.FloatRange(0), "Of everything but biases and LayerNorm."),
    "max_grad_norm": (click.FloatRange(0, min_open=True), "To which gradients are clipped."),
    "precision": (click.Choice(get_args(Precision)), "Of autocast."),
    "seed": (click.IntRange(0), "Of new weights, order and dropout."),
    "eval_steps": (click.IntRange(1), "Steps between evaluations.  [default: one an epoch]"),
    "patience": (click.IntRange(1), "Evaluations without a better one before it stops.  [default: never]"),
    "tokens_per_batch": (click.IntRange(1), "Of a batch in evaluation."),
    "keep": (click.IntRange(1), "Checkpoints that stay."),
    "workers": (click.IntRange(0), "Processes that load batches."),
}
FLAGS = {
    "gradient_checkpointing": "Less memory for a second forward pass.",
    "tensorboard": "Writes curves for TensorBoard.",
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run_options(task: type[Task[Any]]) -> Callable[[Command], Command]:
    """What every task takes: the model, the files, and the settings of the loop, with the task's defaults."""
    defaults = Training(**task.training)
    options = [
        click.option("--model", required=True, help="The model to begin with: a folder, or a name on the hub."),
        click.option("--train", required=True, type=PATH, help="Training examples."),
        click.option("--dev", type=PATH, help="Examples for evaluation.  [default: a part of the training examples]"),
        click.option("--out", required=True, type=NEW_FOLDER, help="Folder of the run, with the model in the end."),
        click.option(
            "--held-out",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.1,
            show_default=True,
            help="That part, by a hash of the text; 0: no evaluation.",
        ),
        click.option("--before", is_flag=True, help="Measures the model before training, too."),
        click.option("--resume", is_flag=True, help="Goes on from the last checkpoint, if there is one."),
        *(
            click.option(_flag(name), type=kind, default=value, show_default=value is not None, help=text)
            for name, (kind, text) in TRAINING.items()
            for value in [getattr(defaults, name)]
        ),
        *(click.option(_flag(name), is_flag=True, help=text) for name, text in FLAGS.items()),
        found_device_option,
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def read_columns(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """ROLE=NAME, several times, as a dictionary."""
    columns = {}
    for value in values:
        role, sign, name = value.partition("=")
        if not (sign and role and name):
            raise click.BadParameter(f"{value!r} is not ROLE=NAME or ROLE=NUMBER")
        columns[role] = name
    return columns


columns_option = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="ROLE=NAME",
    callback=read_columns,
    help="Where a role stands: a column's name or, in a file without a line of names, its number from 1.",
)
max_length_option = click.option(
    "--max-length", type=click.IntRange(3), help="Tokens of the longest text.  [default: as many as the model takes]"
)


@click.group()
def finetune() -> None:
    """Fine-tune a model for a task.

    \b
    bert-fast finetune classify --model bert-base-uncased/ --train train.tsv --out runs/sst2
    bert-fast finetune tag      --model bert-base-cased/ --train train.conll --dev dev.conll --out runs/ner
    bert-fast finetune match    --model all-MiniLM-L6-v2/ --train pairs.csv --out runs/sts
    bert-fast finetune retrieve --model all-MiniLM-L6-v2/ --train scifact/ --out runs/search
    bert-fast finetune qa       --model bert-base-uncased/ --train squad.json --out runs/qa
    """


@finetune.command()
@run_options(Classify)
@click.option(
    "--kind",
    type=click.Choice(get_args(Kind)),
    default="single",
    show_default=True,
    help="One class of a text, any number of classes, or a number.",
)
@columns_option
@max_length_option
@click.option(
    "--class-weights",
    type=click.Choice(["none", "balanced"]),
    default="none",
    show_default=True,
    help="Whether rare classes count more in the loss.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="With --kind multi: the probability from which on a text is of a class.",
)
def classify(**values: Any) -> None:
    """Classes, or numbers, of texts or of pairs of texts.

    Files are .tsv, .csv or .jsonl, also with .gz or .xz, with the columns text (or sentence, question ...), label (or
    category, intent, score ...) and, for pairs, pair (or sentence2, hypothesis ...).

    \b
    bert-fast finetune classify --model bert-base-uncased/ --train train.tsv --out runs/sst2 --epochs 2
    bert-fast finetune classify --model bert-base-uncased/ --train mail.csv --column text=body --column label=topic \\
        --kind multi --out runs/topics
    """
    _run(Classify, values)


@finetune.command()
@run_options(Tag)
@click.option(
    "--scheme",
    type=click.Choice(get_args(SchemeName)),
    default="auto",
    show_default=True,
    help="Of the labels; none: no parts of entities, such as parts of speech.",
)
@click.option("--repair", is_flag=True, help="Makes tags that cannot follow what is before them beginnings.")
@click.option("--token-column", type=click.IntRange(1), default=1, show_default=True, help="Of the words.")
@click.option("--label-column", type=int, default=-1, show_default=True, help="Of the labels; -1: the last.")
@click.option(
    "--words",
    type=click.Choice(get_args(Words)),
    default="blanks",
    show_default=True,
    help="How the texts of predict are cut: at blanks, or signs are words of their own, too.",
)
@columns_option
@max_length_option
@click.option("--stride", type=click.IntRange(0), help="Pieces that windows share.  [default: a quarter of a window]")
def tag(**values: Any) -> None:
    """Labels of words: named entities, parts of speech.

    Files have columns as CoNLL's, a word a line with its label, blank lines between sentences, or are .jsonl with
    {"tokens": [...], "labels": [...]} a line; also with .gz or .xz. Sentences longer than the model are read in
    overlapping windows.

    \b
    bert-fast finetune tag --model bert-base-cased/ --train train.conll --dev dev.conll --out runs/ner
    """
    _run(Tag, values)


@finetune.command()
@run_options(Match)
@click.option(
    "--kind",
    type=click.Choice(get_args(MatchKind)),
    default="bi",
    show_default=True,
    help="A vector for each text and their cosine, or one model that reads both.",
)
@click.option(
    "--loss",
    type=click.Choice(get_args(Loss)),
    default="cosine",
    show_default=True,
    help="With --kind bi: of the cosine's distance from the score, or of the order of scores.",
)
@columns_option
@click.option("--low", type=float, help="The score of no similarity.  [default: the lowest, rounded down]")
@click.option("--high", type=float, help="The score of sameness.  [default: the highest, rounded up]")
@max_length_option
def match(**values: Any) -> None:
    """How similar two texts are.

    Files are .tsv, .csv or .jsonl, also with .gz or .xz, with the columns sentence1, sentence2 and score (or
    similarity, label ...).

    \b
    bert-fast finetune match --model all-MiniLM-L6-v2/ --train pairs.csv --dev dev.csv --out runs/sts
    bert-fast finetune match --model all-MiniLM-L6-v2/ --train pairs.csv --out runs/sts \\
        --column sentence1=1 --column sentence2=2 --column score=3          # without a line of names
    """
    _run(Match, values)


@finetune.command()
@run_options(Retrieve)
@columns_option
@click.option("--split", help="Of a BEIR folder: which of its qrels.  [default: the only one]")
@click.option("--query-prompt", help="Put before each query.  [default: as the model says]")
@click.option("--passage-prompt", help="Put before each passage.  [default: as the model says]")
@max_length_option
@click.option(
    "--mini-batch",
    type=click.IntRange(1),
    help="Texts computed at once, so that --batch-size may be in the thousands.  [default: all]",
)
@click.option(
    "--negatives",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Hard negatives beside each relevant passage, at most.",
)
@click.option(
    "--mine-negatives",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of these so many are found by the start model first.",
)
@click.option("--top", type=click.IntRange(10), default=100, show_default=True, help="Results of a query.")
def retrieve(**values: Any) -> None:
    """Passages for queries, by vectors.

    The training examples are a folder as BEIR has them (corpus.jsonl, queries.jsonl, qrels/train.tsv), or a .tsv, .csv
    or .jsonl with the columns query and positive and, if there are any, negative. The other passages of a batch are
    negatives, too.

    \b
    bert-fast finetune retrieve --model all-MiniLM-L6-v2/ --train scifact/ --out runs/search
    bert-fast finetune retrieve --model all-MiniLM-L6-v2/ --train clicks.jsonl --batch-size 1024 --mini-batch 64 \\
        --mine-negatives 3 --out runs/search
    """
    _run(Retrieve, values)


@finetune.command()
@run_options(Answer)
@columns_option
@click.option("--fix-starts", is_flag=True, help="Looks nearby for answers that are not where the file says.")
@click.option("--empty-is-impossible", is_flag=True, help="No answers in the file mean that there is none.")
@max_length_option
@click.option("--stride", type=click.IntRange(0), default=128, show_default=True, help="Tokens that windows share.")
@click.option(
    "--longest-question", type=click.IntRange(1), default=64, show_default=True, help="Tokens; the rest is cut."
)
@click.option("--longest-answer", type=click.IntRange(1), default=30, show_default=True, help="Tokens.")
@click.option("--n-best", type=click.IntRange(1), default=20, show_default=True, help="Answers that predictions list.")
@click.option(
    "--null-threshold",
    type=float,
    default=0.0,
    show_default=True,
    help="By how much the score of no answer must exceed the best answer's.",
)
def qa(**values: Any) -> None:
    """Answers to questions, as parts of a text.

    Files are SQuAD's .json, 1.1 or 2.0, or .jsonl with question, context and answers a line; also with .gz or .xz.
    Long texts are read in overlapping windows.

    \b
    bert-fast finetune qa --model bert-base-uncased/ --train train-v2.0.json --dev dev-v2.0.json --out runs/qa
    """
    _run(Answer, values)


def _run(kind: type[Task[Any]], values: Mapping[str, Any]) -> None:
    need("tasks", "accelerate", "datasets", "matplotlib", "sentence_transformers", "sklearn", "transformers")
    from . import finetune as work

    with one_line():
        work.run(Console(), kind, values)

"""The tasks in Python: the verbs of the command."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .data.problems import DataError
from .data.runs import Passage
from .finetune import Outcome, Sources
from .finetune import finetune as run
from .reranking import Ranked
from .reranking import rerank as ranked
from .settings import Training
from .table import task_named
from .task import Model, Prediction, Task
from .use import TOKENS_PER_BATCH, Tuned, open_cross_encoder, open_model
from .vectors import Found, Searcher

__all__ = ["evaluate", "finetune", "predict", "rerank", "search"]

SOURCE = "source"  # what messages call Python objects


def finetune(
    task: str | Task[Any],
    *,
    model: str | Path,
    train: str | Path,
    out: str | Path,
    dev: str | Path | None = None,
    held_out: float = 0.1,
    resume: bool = False,
    before: bool = False,
    device: torch.device | str | None = None,
    command: str | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    is_quiet: bool = True,
    **settings: Any,
) -> Outcome:
    """Fine-tunes a model for a task and writes it, as transformers or sentence-transformers load it.

    `finetune("classify", model="bert-base-uncased", train="train.tsv", out="run", epochs=2, kind="multi")`

    Args:
        task: name, or a task with its settings.
        model: folder, or name on the hub, of an encoder or of a model for the task.
        train: file of training examples.
        out: folder of the run; new or empty, unless a run is to go on.
        dev: file of examples for evaluation; None: a part of the training examples.
        held_out: that part; 0: there is no evaluation.
        resume: whether to go on from the run's last checkpoint, if there is one.
        before: whether the model is judged before training, too.
        device: "cpu" or "cuda"; None: a GPU if there is one.
        command: how the run was called, for the card.
        on_log: gets what the Trainer logs.
        is_quiet: whether the Trainer's progress bar stays off.
        settings: of the task, such as kind, and of Training, such as epochs.

    Raises:
        DataError: a file's first fault.
        DivergedError: the loss became NaN or infinite.
        ValueError: a setting is unknown or not allowed, or `out` holds something else.
        OSError: a file or a model cannot be read.
    """
    found, training = sorted_settings(task, settings)
    sources = Sources(model=str(model), train=Path(train), dev=None if dev is None else Path(dev), held_out=held_out)
    return run(
        found,
        sources,
        Path(out),
        training,
        resume=resume,
        before=before,
        device=None if device is None else torch.device(device),
        command=command,
        on_log=on_log,
        is_quiet=is_quiet,
    )


def predict(
    model: str | Path | Tuned,
    source: str | Path | Iterable[Any],
    *,
    task: str | None = None,
    device: torch.device | str | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    int8: bool = False,
    **settings: Any,
) -> list[Prediction]:
    """What a model says of texts, each a dict that JSON can hold, in their order.

    `predict("run", ["a fine film", "a dull one"])`

    Args:
        model: folder, from finetune or of a model fine-tuned elsewhere; or what open_model returned.
        source: a file, or Python objects: texts, pairs of texts, or dicts with the fields of a .jsonl file.
        task: name of the task; None: what the folder says, or the model's head.
        device: "cpu" or "cuda"; None: a GPU if there is one.
        tokens_per_batch: of a batch of texts of about equal length.
        int8: whether products are in 8 bits, on CPUs; see swap.
        settings: of the task, stronger than those with which the model was trained, such as columns.

    Raises:
        DataError: the first fault of the file or of the objects, or they do not go with the model.
        ValueError: a setting is unknown or not allowed, or the model is for another task.
        OSError: the file or the model cannot be read.
    """
    tuned = _tuned(model, task, device, int8, settings)
    with _examples(tuned.task, source, settings, is_labelled=False) as examples:
        return tuned.predict(examples, tokens_per_batch)


def evaluate(
    model: str | Path | Tuned,
    source: str | Path | Iterable[Any],
    *,
    task: str | None = None,
    device: torch.device | str | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    int8: bool = False,
    **settings: Any,
) -> dict[str, float]:
    """How right a model is, by the task's measures; see predict.

    Args:
        model: see predict.
        source: a file, or dicts, with what is right.
        task: see predict.
        device: see predict.
        tokens_per_batch: see predict.
        int8: see predict.
        settings: see predict.

    Raises:
        DataError, ValueError, OSError: as predict does.
    """
    tuned = _tuned(model, task, device, int8, settings)
    with _examples(tuned.task, source, settings, is_labelled=True) as examples:
        return tuned.measure(examples, tuned.predict(examples, tokens_per_batch))


def search(
    vectors: str | Path,
    queries: Sequence[str],
    *,
    model: str | Path | Model,
    texts: Sequence[str] | str | Path | None = None,
    top: int = 10,
    **options: Any,
) -> list[list[Found]]:
    """The texts nearest to each query, the nearest first.

    `search("vectors.npy", ["where is my card?"], model="all-MiniLM-L6-v2", texts="corpus.jsonl")`

    Args:
        vectors: file that embed made.
        queries: any number of texts.
        model: see vectors.Searcher, which for several searches is opened once.
        texts: see vectors.Searcher.
        top: results of a query.
        options: further arguments of vectors.Searcher.

    Raises:
        ValueError, DataError, ImportError: see vectors.Searcher.
    """
    known = Path(texts) if isinstance(texts, (str, Path)) else texts
    return Searcher(model, Path(vectors), known, **options)(queries, top)


def rerank(
    model: str | Path | Model,
    queries: Sequence[str],
    candidates: Sequence[Sequence[str | Passage]],
    *,
    top: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    device: torch.device | str | None = None,
    int8: bool = False,
) -> list[list[Ranked]]:
    """The candidates of each query in the order of a cross-encoder's scores.

    `rerank("ms-marco-MiniLM-L6-v2", ["who wrote it?"], [["a passage", "another"]])`

    Args:
        model: folder, or name on the hub, of a cross-encoder; or what load_cross_encoder returned.
        queries: any number of texts.
        candidates: passages for each query, in the order that they have so far.
        top: how many are kept; None: all.
        tokens_per_batch: see predict.
        device: see predict.
        int8: see predict.

    Raises:
        ValueError: see bert_fast.tasks.reranking.
        OSError: the model cannot be read.
    """
    if not isinstance(model, Model):
        model = open_cross_encoder(str(model), device=device, int8=int8)
    elif device is not None or int8:
        raise ValueError("device and int8 are given to open_cross_encoder, where the model is opened")
    return ranked(model, queries, candidates, top=top, tokens_per_batch=tokens_per_batch)


# ---- settings --------------------------------------------------------------------------------------------------------


def sorted_settings(task: str | Task[Any], settings: dict[str, Any]) -> tuple[Task[Any], Training]:
    """The task and the training that settings are for, told apart by their names.

    Args:
        task: name, or a task with its settings; then all of `settings` are for Training.
        settings: by name.

    Raises:
        ValueError: a name is unknown, or a value is not allowed.
    """
    kind = task_named(task) if isinstance(task, str) else type(task)
    of_task = {entry.name for entry in fields(kind)} if isinstance(task, str) else set()
    of_training = {entry.name for entry in fields(Training)}
    for name in settings:
        if name not in of_task | of_training:
            near = difflib.get_close_matches(name, of_task | of_training, n=3)
            known = (
                f"did you mean {' or '.join(near)}" if near else f"there are {', '.join(sorted(of_task | of_training))}"
            )
            raise ValueError(f"setting {name!r} is unknown; {known}")
    found = kind.of_settings({name: settings[name] for name in settings if name in of_task})
    loop = {name: value for name, value in settings.items() if name not in of_task}
    return found if isinstance(task, str) else task, Training(**{**kind.training, **loop})


# ---- examples --------------------------------------------------------------------------------------------------------


def _tuned(
    model: str | Path | Tuned, task: str | None, device: torch.device | str | None, int8: bool, settings: dict[str, Any]
) -> Tuned:
    if not isinstance(model, Tuned):
        return open_model(
            Path(model), task, device=None if device is None else torch.device(device), int8=int8, **settings
        )
    if task is not None or device is not None or int8:
        raise ValueError("task, device and int8 are given to open_model, where the model is opened")
    return Tuned(model.task.of_settings({**model.task.settings(), **settings}), model.model)


@contextmanager
def _examples(
    task: Task[Any], source: str | Path | Iterable[Any], settings: dict[str, Any], *, is_labelled: bool
) -> Iterator[list[Any]]:
    """A source's examples; errors within name the file, or the place among the objects."""
    if isinstance(source, (str, Path)):
        yield task.read(Path(source), is_labelled=is_labelled)
        return
    if isinstance(source, dict):
        raise ValueError("source is a dict; a file or a list of texts, pairs or dicts is needed")
    objects = list(source)
    if not objects and not is_labelled:
        yield []
        return
    if "columns" not in settings and any(entry.name == "columns" for entry in fields(task)):
        task = replace(task, columns={})  # type: ignore[call-arg]
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{SOURCE}.jsonl"
        try:
            _write(file, objects, task.parts)
            yield task.read(file, is_labelled=is_labelled)
        except DataError as error:
            raise DataError(str(error).replace(str(file), SOURCE)) from None


def _write(file: Path, objects: list[Any], parts: tuple[str, ...]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for number, item in enumerate(objects, 1):
            try:
                stream.write(json.dumps(_as_dict(item, parts), ensure_ascii=False) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"{SOURCE}:{number}: {error}") from None


def _as_dict(item: Any, parts: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(item, dict):
        return item
    values = (item,) if isinstance(item, str) else item
    if not isinstance(values, (tuple, list)) or not 1 <= len(values) <= len(parts):
        raise TypeError(f"{item!r:.80}; a text, up to {len(parts)} of them ({', '.join(parts)}) or a dict is needed")
    return dict(zip(parts, values, strict=False))

"""bert-fast pretrain: a run, and what came of it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from bert_fast.config import BertConfig
from bert_fast.heads import BertForPreTraining
from bert_fast.pretraining import vocabulary as vocabularies
from bert_fast.pretraining.corpus import CorpusError
from bert_fast.pretraining.instances import Kind
from bert_fast.pretraining.shards import Corpus
from bert_fast.pretraining.stream import PackStream
from bert_fast.pretraining.vocabulary import Vocabulary

from .fill_mask import load_model
from .lines import say
from .prepare import PARTS

if TYPE_CHECKING:
    from bert_fast.pretraining.log import Evaluation
    from bert_fast.pretraining.loop import Result, Run

PAIRS = {"nsp": "next sentence", "sop": "sentence order"}


class VocabularyError(ValueError):
    """A model and a corpus that do not have the same vocabulary."""


# ---- run -------------------------------------------------------------------------------------------------------------


def run(console: Console, file: Path, overrides: Sequence[str], *, resume: bool) -> None:
    """Trains as a file says, and says how it goes. Every process of a distributed run calls it.

    Args:
        console: of which the first process's is used.
        file: TOML.
        overrides: see bert_fast.pretraining.config.load.
        resume: whether to go on from the last checkpoint.

    Raises:
        ConfigError, CheckpointError, ValueError, OSError, ImportError: see bert_fast.pretraining.loop.
        SystemExit: 130, after Ctrl-C.
    """
    from bert_fast.pretraining import config as configuration
    from bert_fast.pretraining.loop import Run

    config = configuration.load(file, overrides)
    training = Run(config, console)
    if training.console is not None:
        _introduce(console, training, is_resumed=resume)
    try:
        result = training.go(resume=resume)
    except KeyboardInterrupt:
        if training.console is not None:
            _say_how_to_go_on(console, file, overrides, config.out)
        raise SystemExit(130) from None
    training.accelerator.end_training()
    if training.console is not None:
        _conclude(console, config.out, result, config.data.instances)


def _introduce(console: Console, training: Run, *, is_resumed: bool) -> None:
    """The essentials of a run."""
    config, accelerator = training.config, training.accelerator
    model: BertConfig = training.tally.config
    parameters = sum(parameter.numel() for parameter in training.objective.parameters())
    schedule, batch, supply = config.schedule, config.batch, training.supply
    packs = sorted({supply.packs_of_step(phase) for phase in config.phases})
    lengths = ", then ".join(str(phase.length) for phase in config.phases)
    amount = f"{schedule.steps:,} steps" if schedule.steps is not None else f"{schedule.minutes:g} minutes"
    rows = {
        "model": f"{model.num_hidden_layers} layers, {model.hidden_size} wide, {parameters:,} parameters",
        "corpus": f"{supply.corpus.total_tokens:,} tokens, held out {supply.held_out.total_tokens:,}; "
        f"vocabulary {supply.vocabulary.size:,}",
        "step": f"{' or '.join(map(str, packs))} packs of {batch.tokens_per_pack:,} tokens; "
        f"sequences of up to {lengths} tokens",
        "run": f"{amount} on {accelerator.num_processes} x {accelerator.device.type}, {config.train.precision}",
        "out": str(config.out),
    }
    if is_resumed:
        found = _last_checkpoint(config.out)
        rows["resume"] = "from the start: there is no checkpoint yet" if found is None else f"from {found}"
    for name, text in rows.items():
        say(console, f"{name:8}{text}")


def _last_checkpoint(out: Path) -> Path | None:
    from bert_fast.pretraining import checkpoints

    found = checkpoints.find(out / "checkpoints")
    return found[-1] if found else None


def _say_how_to_go_on(console: Console, file: Path, overrides: Sequence[str], out: Path) -> None:
    found = _last_checkpoint(out)
    where = "starts again: there is no checkpoint yet" if found is None else f"goes on from {found}"
    settings = [part for override in overrides for part in ("--set", override)]
    command = shlex.join(["bert-fast", "pretrain", "run", str(file), *settings, "--resume"])
    say(console, f"stopped; {command} {where}")


def _conclude(console: Console, out: Path, result: Result, kind: Kind) -> None:
    if result.evaluation is not None:
        show(console, figures(result.evaluation), PAIRS.get(kind))
    say(console, f"checkpoint in {result.folder}")
    try:
        plot(out, out / "loss.png")
    except (OSError, ValueError) as error:  # of the picture; the model is there
        say(console, f"no picture of the loss: {error}")
    else:
        say(console, f"loss in {out / 'loss.png'}")


def plot(folder: Path, out: Path) -> None:
    """Draws the loss of the run in `folder`; see bert_fast.pretraining.plot."""
    from bert_fast.pretraining.log import LOG_NAME
    from bert_fast.pretraining.plot import plot as draw

    draw(folder / LOG_NAME, out)


# ---- eval ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What a model is judged by.

    Attributes:
        part: of the corpus.
        instances: see bert_fast.pretraining.instances.
        length: tokens of the longest sequence.
        packs: how many are read at most.
        tokens_per_pack: tokens of each.
    """

    part: Literal["train", "held_out"]
    instances: Kind
    length: int
    packs: int
    tokens_per_pack: int


def evaluate(console: Console, folder: Path, corpus_folder: Path, judgement: Judgement, json_file: Path | None) -> None:
    """Prints how well a model predicts a corpus, and writes it where it is wanted. Every process calls it.

    Args:
        console: of which the first process's is used.
        folder: a Hugging Face checkpoint of BERT with a masked-LM head.
        corpus_folder: of a prepared corpus.
        judgement: see Judgement.
        json_file: where to write the figures.

    Raises:
        ModelError: see load_model.
        VocabularyError: the model has another vocabulary than the corpus.
        CorpusError: the part has no text.
        ValueError: the folder is no corpus, the model has not as many positions, or see PackStream.
    """
    import torch
    from accelerate import Accelerator

    from bert_fast.pretraining.evaluation import evaluate as judge
    from bert_fast.pretraining.objective import Objective

    corpus = Corpus.open(corpus_folder, judgement.part)
    if corpus.total_tokens == 0:
        other = next(part for part in PARTS if part != judgement.part)
        raise CorpusError(f"{corpus_folder} has no text in its part {judgement.part}; --part {other} has it all")
    model, has_pairs = load_model(folder, BertForPreTraining)
    check_vocabulary(folder, model.config, corpus.vocabulary)
    positions = model.config.max_position_embeddings
    if judgement.length > positions:
        raise ValueError(f"--length is {judgement.length}; {folder} takes {positions} at most")
    kind, length, capacity = judgement.instances, judgement.length, judgement.tokens_per_pack
    if capacity < length:
        raise ValueError(f"--tokens-per-pack is {capacity}; it must be at least --length, {length}")
    stream = PackStream(corpus.shards, kind, length, capacity, short_seq_prob=0.0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    objective = Objective(model).to(accelerator.device)
    evaluation = judge(accelerator, objective, stream, corpus.vocabulary, packs=judgement.packs)
    is_first = accelerator.is_main_process
    accelerator.end_training()
    if not is_first:
        return
    values = figures(evaluation)
    if kind in PAIRS and not has_pairs:
        values["nsp_accuracy"] = None
        say(console, f"{folder} has no next-sentence head; {PAIRS[kind]} is left out")
    show(console, values, PAIRS.get(kind))
    if json_file is not None:
        write_json(json_file, {"model": str(folder), "corpus": str(corpus_folder), **asdict(judgement), **values})


def check_vocabulary(folder: Path, config: BertConfig, vocabulary: Vocabulary) -> None:
    """Whether ids mean the same to a model as to a corpus.

    A folder without a tokenizer can only be asked for the number of tokens.

    Args:
        folder: of the model.
        config: the model's.
        vocabulary: the corpus'.

    Raises:
        VocabularyError: they do not.
        ValueError: the folder has a tokenizer that cannot be read.
    """
    try:
        own = vocabularies.load(folder)
    except FileNotFoundError:
        if config.vocab_size != vocabulary.size:
            raise VocabularyError(
                f"{folder} has {config.vocab_size} tokens and the corpus {vocabulary.size}; "
                "a model is judged on a corpus of its own vocabulary"
            ) from None
        return
    if own.fingerprint != vocabulary.fingerprint and own.tokenizer.get_vocab() != vocabulary.tokenizer.get_vocab():
        raise VocabularyError(
            f"{folder} has another vocabulary ({own.size} tokens) than the corpus ({vocabulary.size}); "
            f"pretrain prepare --vocabulary {folder} makes a corpus for it"
        )
    if own.size > config.vocab_size:
        raise VocabularyError(f"{folder} has a vocabulary of {own.size} tokens; its model has only {config.vocab_size}")


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """What an evaluation found, with the perplexity, e to the loss."""
    values = asdict(evaluation)
    del values["step"]
    try:
        perplexity = math.exp(evaluation.mlm_loss)
    except OverflowError:
        perplexity = math.inf
    return {"mlm_loss": values.pop("mlm_loss"), "perplexity": perplexity, **values}


def show(console: Console, values: Mapping[str, Any], pairs: str | None) -> None:
    """A line for each figure; pairs: what the pairs are judged by."""
    rows = {
        "masked-LM loss": f"{values['mlm_loss']:.4f}",
        "perplexity": f"{values['perplexity']:,.2f}",
        "accuracy": f"{values['mlm_accuracy']:.2%}",
    }
    if pairs is not None and values["nsp_accuracy"] is not None:
        rows[pairs] = f"{values['nsp_accuracy']:.2%}"
    for name, text in {**rows, "tokens": f"{values['tokens']:,}"}.items():
        say(console, f"{name:16}{text:>12}")


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Numbers that JSON lacks become "nan" and "inf"."""
    finite = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    file.write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")

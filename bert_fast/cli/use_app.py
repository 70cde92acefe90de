"""The commands that use fine-tuned models and vectors, and their options; the work is in use.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click
import torch
from rich.console import Console

from bert_fast.tasks import TASKS
from bert_fast.tasks.settings import Precision
from bert_fast.tasks.vectors.embed import Engine
from bert_fast.tasks.vectors.search import Engine as SearchEngine
from bert_fast.tasks.vectors.search import Metric

from .finetune_app import columns_option
from .options import (
    FILE,
    FOLDER,
    NEW_FILE,
    PATH,
    check_out,
    device_of_any_option,
    found_device_option,
    need,
    one_line,
    present_device,
)

MODEL = click.option("--model", required=True, help="A folder, or a name on the hub.")
TOKENS = click.option(
    "--tokens-per-batch", type=click.IntRange(1), default=16_384, show_default=True, help="Of a batch, with padding."
)
INT8 = click.option("--int8", is_flag=True, help="Products in 8 bits, on a CPU: faster, a little less exact.")


def read_settings(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE, several times, as a dictionary; a value is JSON, or text."""
    settings = {}
    for value in values:
        name, sign, text = value.partition("=")
        if not (sign and name):
            raise click.BadParameter(f"{value!r} is not NAME=VALUE")
        try:
            settings[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            settings[name.replace("-", "_")] = text
    return settings


task_option = click.option(
    "--task", type=click.Choice(list(TASKS)), help="Of the model.  [default: as its folder says]"
)
settings_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    callback=read_settings,
    help="A setting of the task, such as threshold=0.3, stronger than that of the training.",
)


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("source", type=PATH)
@click.option("--out", type=NEW_FILE, help="Where to write, .jsonl.  [default: the screen]")
@task_option
@columns_option
@settings_option
@TOKENS
@INT8
@found_device_option
def predict(
    model: Path,
    source: Path,
    out: Path | None,
    task: str | None,
    columns: dict[str, str],
    settings: dict[str, Any],
    tokens_per_batch: int,
    int8: bool,
    device: torch.device | None,
) -> None:
    """Say what a fine-tuned model makes of a file.

    MODEL is the folder of a run of finetune, or of a classifier, tagger or question answerer of transformers. SOURCE is
    a file as finetune takes it; what is to be predicted may be missing. A JSON object a line comes out, in the order
    of SOURCE.

    \b
    bert-fast predict runs/sst2 reviews.tsv --out predictions.jsonl
    bert-fast predict runs/ner sentences.txt
    bert-fast predict runs/qa questions.jsonl --set n_best=3
    """
    _need()
    from . import use as work

    with one_line():
        check_out("--out", out, [source], [".jsonl"])
        tuned = work.open_tuned(model, task, device, int8, columns, settings)
        work.predict(Console(), tuned, source, out, tokens_per_batch)


@click.command("eval")
@click.argument("model", type=FOLDER)
@click.argument("source", type=PATH)
@click.option("--json", "json_file", type=NEW_FILE, help="Where to write the measures, as JSON.")
@task_option
@columns_option
@settings_option
@TOKENS
@INT8
@found_device_option
def evaluate(
    model: Path,
    source: Path,
    json_file: Path | None,
    task: str | None,
    columns: dict[str, str],
    settings: dict[str, Any],
    tokens_per_batch: int,
    int8: bool,
    device: torch.device | None,
) -> None:
    """Measure how right a fine-tuned model is.

    MODEL is as for predict. SOURCE is a file as finetune takes it.

    \b
    bert-fast eval runs/sst2 dev.tsv
    bert-fast eval all-MiniLM-L6-v2/ sts-dev.csv --task match --json measures.json
    """
    _need()
    from . import use as work

    with one_line():
        check_out("--json", json_file, [source])
        tuned = work.open_tuned(model, task, device, int8, columns, settings)
        work.evaluate(Console(), tuned, source, json_file, tokens_per_batch)


@click.command()
@MODEL
@click.option(
    "--in",
    "sources",
    required=True,
    multiple=True,
    type=PATH,
    help="Texts: .txt, .jsonl, .tsv, .csv, .parquet, or folders of them; may be given several times.",
)
@click.option("--out", required=True, type=NEW_FILE, help="Vectors, .npy or .parquet.")
@columns_option
@click.option(
    "--on-problem",
    type=click.Choice(["refuse", "blank"]),
    default="refuse",
    show_default=True,
    help="What cannot be read is an error, or an empty text.",
)
@click.option("--prompt", help="Put before each text.")
@click.option("--prompt-name", help="The prompt of this name that the model brings.")
@click.option("--normalize", is_flag=True, help="Scales vectors to length 1.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Of the file."
)
@click.option("--max-length", type=click.IntRange(3), help="Tokens of the longest text.  [default: as the model says]")
@click.option(
    "--block",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Texts that are embedded and written together.",
)
@TOKENS
@click.option(
    "--precision", type=click.Choice(get_args(Precision)), default="fp32", show_default=True, help="Of the model."
)
@INT8
@click.option("--keep-text", is_flag=True, help="Writes the texts into a .parquet file, too.")
@click.option(
    "--engine",
    type=click.Choice(get_args(Engine)),
    default="local",
    show_default=True,
    help="This process, or those of a Ray cluster.",
)
@click.option(
    "--workers", type=click.IntRange(1), help="With --engine ray: processes.  [default: as there is room for]"
)
@click.option("--cpus", type=click.FloatRange(0), help="With --engine ray: of each.  [default: 1]")
@click.option("--gpus", type=click.FloatRange(0), help="With --engine ray: of each.  [default: 1 where there are any]")
@click.option("--address", help="With --engine ray: of a running cluster.  [default: RAY_ADDRESS, or one of its own]")
@device_of_any_option
def embed(**values: Any) -> None:
    """Turn texts into vectors.

    Rows of the file are in the order of the texts. Memory stays the same however many there are. An interrupted call
    goes on where it was when the same command is given again, whichever the engine.

    \b
    bert-fast embed --model all-MiniLM-L6-v2/ --in texts.jsonl --out vectors.npy
    bert-fast embed --model e5-base/ --in corpus/ --out vectors.parquet --prompt "passage: " --keep-text
    bert-fast embed --model all-MiniLM-L6-v2/ --in corpus/ --out vectors.npy --engine ray --workers 8
    """
    need("tasks", "sentence_transformers", "pyarrow")
    if values["engine"] == "ray":
        need("ray", "ray")
    elif any(values[name] is not None for name in ("workers", "cpus", "gpus", "address")):
        raise click.UsageError("--workers, --cpus, --gpus and --address need --engine ray")
    else:
        present_device(click.get_current_context(), None, values["device"])
    from . import vectors as work

    with one_line():
        work.embed(Console(), values)


@click.command()
@click.argument("vectors", type=FILE)
@MODEL
@click.option("--query", "queries", multiple=True, help="What to look for; may be given several times.")
@click.option("--queries", "file", type=FILE, help="Queries of a file, as the texts of embed.")
@click.option("--texts", type=PATH, help="What was embedded, to show it.  [default: what a .parquet file says]")
@columns_option
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Results of a query.")
@click.option("--prompt", help="Put before each query.")
@click.option("--prompt-name", help="The prompt of this name that the model brings.")
@click.option(
    "--metric",
    type=click.Choice(get_args(Metric)),
    help="Cosine, or inner product.  [default: as the model says, which mostly is cosine]",
)
@click.option(
    "--engine",
    type=click.Choice(get_args(SearchEngine)),
    default="exact",
    show_default=True,
    help="Every vector, or an index of faiss or usearch.",
)
@click.option("--index", type=click.Path(dir_okay=False, path_type=Path), help="The index's file, made if missing.")
@click.option("--other-model", is_flag=True, help="The model may be another than that of the vectors.")
@click.option("--out", type=NEW_FILE, help="Where to write, .jsonl.  [default: tables on the screen]")
@INT8
@device_of_any_option
def search(**values: Any) -> None:
    """Find the texts nearest to queries.

    VECTORS is a file that embed has made with the same model.

    \b
    bert-fast search vectors.npy --model all-MiniLM-L6-v2/ --texts texts.jsonl --query "where is my card?"
    bert-fast search vectors.parquet --model all-MiniLM-L6-v2/ --queries queries.txt --top 100 --out run.jsonl
    """
    if bool(values["queries"]) == (values["file"] is not None):
        raise click.UsageError("either --query or --queries is needed")
    need("tasks", "sentence_transformers")
    if values["engine"] != "exact":
        need("search", values["engine"])
    from . import vectors as work

    present_device(click.get_current_context(), None, values["device"])
    with one_line():
        read = [values[name] for name in ("vectors", "file", "texts", "index")]
        check_out("--out", values["out"], read, [".jsonl"])
        work.search(Console(), values)


@click.command()
@MODEL
@click.option("--in", "source", required=True, type=FILE, help="Queries with their candidates.")
@click.option("--out", required=True, type=NEW_FILE, help=".jsonl, or .trec, a run as trec_eval reads it.")
@click.option("--queries", type=PATH, help="Where --in is a run: texts of the queries, with ids.")
@click.option("--corpus", type=PATH, help="Where --in is a run: texts of the passages, with ids.")
@columns_option
@click.option("--top", type=click.IntRange(1), help="Passages kept of each query.  [default: all]")
@click.option("--max-length", type=click.IntRange(3), help="Tokens of the longest pair.  [default: as the model says]")
@TOKENS
@INT8
@found_device_option
def rerank(**values: Any) -> None:
    """Put candidates into a better order with a cross-encoder.

    --in is .jsonl with {"query": ..., "passages": [...]} a line, or a run with ids alone.

    \b
    bert-fast rerank --model ms-marco-MiniLM-L6-v2/ --in candidates.jsonl --out reranked.jsonl
    bert-fast rerank --model runs/cross --in run.trec --queries queries.jsonl --corpus corpus.jsonl --out reranked.trec
    """
    if (values["queries"] is None) != (values["corpus"] is None):
        raise click.UsageError("--queries and --corpus are needed together")
    if values["columns"] and values["corpus"] is None:
        raise click.UsageError("--column is of --corpus, which is missing")
    need("tasks", "sentence_transformers")
    from . import vectors as work

    with one_line():
        check_out(
            "--out", values["out"], [values[name] for name in ("source", "queries", "corpus")], [".jsonl", ".trec"]
        )
        work.rerank(Console(), values)


def _need() -> None:
    need("tasks", "scipy", "sentence_transformers", "sklearn", "transformers")

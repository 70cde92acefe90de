"""python -m benchmarks.gpu --out FOLDER"""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.console import Console

KERNELS = ("attention", "attention-backward", "layer_norm", "layer_norm-backward", "gelu", "gelu-backward")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Receives the results.")
@click.option("--minutes", default=9.0, show_default=True, type=click.FloatRange(0, 600), help="When to end.")
@click.option("--dry", is_flag=True, help="Every case, tiny, on a CPU in Triton's interpreter.")
@click.option("--only", multiple=True, help="Cases whose row or name contains this, without the tests; repeatable.")
@click.option("--tests/--no-tests", default=True, help="Whether pytest runs first.")
@click.option("--rounds", default=200, show_default=True, type=click.IntRange(1), help="At most so many; 1: a warm-up.")
@click.option("--tune", multiple=True, type=click.Choice(KERNELS), help="Time launch sizes instead; repeatable.")
def main(
    out: Path, minutes: float, dry: bool, only: tuple[str, ...], tests: bool, rounds: int, tune: tuple[str, ...]
) -> None:
    """Measure every GPU target against its peers. Exit status 1: a test failed, a result is wrong, or a case broke."""
    if dry:  # Triton reads it when it is imported, so before everything else
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    console = Console(width=150)
    if not dry and not torch.cuda.is_available():
        raise click.UsageError("this machine has no CUDA device; --dry runs without one")
    if tune:
        from .tune import run as run_tuning

        is_good = run_tuning(out, tune, minutes, dry, console)
    else:
        from .cases import chosen
        from .run import run

        cases = chosen(only)
        if not cases:
            raise click.BadParameter(f"no case's name contains {' or '.join(only)}", param_hint="--only")
        is_good = run(out, minutes, dry, cases, tests and not only and not dry, rounds, console)
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()

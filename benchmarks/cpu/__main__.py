"""python -m benchmarks.cpu --out FILE.json"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1440:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1440")
    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description="Measures encoders on this CPU against their peers. "
        "Exit status 1: a result of ours is wrong, or a row broke.",
    )
    add = made.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="receives the results, as JSON")
    add("--threads", nargs="+", default=[1, 2], type=positive, metavar="N", help="default: 1 2; a process each")
    add("--only", nargs="+", action="extend", default=[], metavar="NAME", help="rows whose name contains one of these")
    add("--grid", action="store_true", help="also every batch of 1-64 x length of 8-512, which takes long")
    add("--minutes", default=180.0, type=minutes, metavar="N", help="when to begin no more row; default: 180")
    add("--stsb", type=Path, metavar="FILE", help="STS-B's dev set: a CSV of sentence1,sentence2,score, no header")
    add("--dry", action="store_true", help="every row, tiny, one round")
    return made


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    from .rows import chosen, read_pairs
    from .run import run

    rows = chosen(options.only, options.grid or options.dry)
    if not rows:
        parser().error(f"--only: no row's name contains {' or '.join(options.only)}")
    if options.stsb is not None:
        try:
            read_pairs(options.stsb)
        except (OSError, ValueError) as error:
            parser().error(f"--stsb: {error}")
        options.stsb = options.stsb.resolve()
    threads = sorted(set(options.threads))
    return 0 if run(options.out, threads, rows, options.minutes, options.dry, options.stsb) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

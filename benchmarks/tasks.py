"""python -m benchmarks.tasks --data FOLDER: every task fine-tuned and used, beside plain transformers.

Both sides run bert_fast.tasks with the same files, seeds and batches, each run in a process of its own, in turns; on
the plain side BERT_FAST=off leaves transformers' and sentence-transformers' models as they are, with SDPA. FOLDER has
sst2/train.tsv, banking77/train.csv, wnut17/{train,dev}.conll, stsb/{train,dev}.csv, squad/train.json and scifact/ with
BEIR's files, any of them as .xz. Reduced data unless --full. A case takes the place of what --out said of it before.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bert_fast.cli.models import demo_folder
from bert_fast.lines import open_bytes
from bert_fast.tasks import Sources, Training, open_model, task_named
from bert_fast.tasks.data.split import is_held_out
from bert_fast.tasks.finetune import finetune

from .facts import heading, write_json

OUT = Path("benchmarks/results/cpu-tasks.json")
FULL = Path("benchmarks/results/cpu-tasks-full.json")
PACKAGES = ("bert-fast", "torch", "transformers", "sentence-transformers", "accelerate", "numpy")
OURS, PLAIN = "bert-fast", "plain"

HELD_OUT_ARTICLES = 5
INFERRED = 2_000  # examples at the most, from the beginning
ROUNDS = 3  # of inference


# ---- data ------------------------------------------------------------------------------------------------------------


def find(folder: Path, name: str) -> Path:
    """The file, or its .xz."""
    for file in (folder / name, folder / f"{name}.xz"):
        if file.is_file():
            return file
    raise SystemExit(f"{folder / name} is missing")


def text_of(file: Path) -> str:
    with open_bytes(file) as stream:
        return stream.read().decode("utf-8").replace("\r\n", "\n")


def some_lines(file: Path, out: Path, share: float, *, has_header: bool) -> Path:
    """A share of a table's lines, by a hash of each."""
    lines = text_of(file).splitlines(keepends=True)
    head, rest = (lines[:1], lines[1:]) if has_header else ([], lines)
    out.write_text("".join([*head, *(line for line in rest if is_held_out(line, share))]), encoding="utf-8")
    return out


def some_classes(file: Path, out: Path, share: float) -> Path:
    """The lines of a share of the classes, which stand in the last column, after a line of names."""
    head, *rows = csv.reader(io.StringIO(text_of(file)))
    with out.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([head, *(row for row in rows if is_held_out(row[-1], share))])
    return out


def some_sentences(file: Path, out: Path, share: float) -> Path:
    """A share of a CoNLL file's sentences."""
    sentences = re.split(r"\n\s*\n", text_of(file).strip())
    out.write_text("\n\n".join(text for text in sentences if is_held_out(text, share)) + "\n", encoding="utf-8")
    return out


def articles(file: Path, work: Path, share: float) -> tuple[Path, Path]:
    """SQuAD's last articles for evaluation, and the others; of each a share of the paragraphs."""
    whole = json.loads(text_of(file))
    for article in whole["data"]:
        article["paragraphs"] = [row for row in article["paragraphs"] if is_held_out(row["context"], share)]
    found = [article for article in whole["data"] if article["paragraphs"]]
    parts = {"train": found[:-HELD_OUT_ARTICLES], "dev": found[-HELD_OUT_ARTICLES:]}
    for name, part in parts.items():
        (work / f"{name}.json").write_text(json.dumps({"version": whole["version"], "data": part}), encoding="utf-8")
    return work / "train.json", work / "dev.json"


def part_of_beir(folder: Path, work: Path, share: float) -> Path:
    """A share of the queries, the documents that answer them, and the same share of the other documents."""
    work.mkdir(exist_ok=True)
    queries = some_lines(find(folder, "queries.jsonl"), work / "queries.jsonl", share, has_header=False)
    kept = {json.loads(line)["_id"] for line in queries.read_text(encoding="utf-8").splitlines()}
    head, *rows = text_of(find(folder, "qrels-train.tsv")).splitlines()
    rows = [row for row in rows if row.split("\t")[0] in kept]
    (work / "qrels-train.tsv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    relevant = {row.split("\t")[1] for row in rows}
    documents = text_of(find(folder, "corpus.jsonl")).splitlines(keepends=True)
    some = [line for line in documents if json.loads(line)["_id"] in relevant or is_held_out(line, share)]
    (work / "corpus.jsonl").write_text("".join(some), encoding="utf-8")
    return work


# ---- cases -----------------------------------------------------------------------------------------------------------

Files = Callable[[Path, Path, float], "tuple[Path, Path | None]"]
Reduce = Callable[[Path, Path, float], Path]


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        task: its name.
        files: (data, work, share) -> training examples and those for evaluation.
        measure: that is reported.
        share: of the data in the reduced form.
        reduced, full: settings of the loop in both forms.
        settings: of the task.
        held_out: share for evaluation where there is no file for it.
        before: whether the model says anything before it is trained.
    """

    task: str
    files: Files
    measure: str
    share: float
    reduced: dict[str, Any]
    full: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    held_out: float = 0.1
    before: bool = False


def one_file(name: str, reduce: Reduce) -> Files:
    """A part of the file is held out."""

    def files(data: Path, work: Path, share: float) -> tuple[Path, None]:
        source = find(data, name)
        return source if share == 1 else reduce(source, work / Path(name).name, share), None

    return files


def two_files(name: str, reduce: Reduce) -> Files:
    """Training and evaluation files; of the latter a larger share, for it costs less."""

    def files(data: Path, work: Path, share: float) -> tuple[Path, Path]:
        train, dev = find(data, name.format("train")), find(data, name.format("dev"))
        if share == 1:
            return train, dev
        suffix = Path(name).suffix
        return reduce(train, work / f"train{suffix}", share), reduce(dev, work / f"dev{suffix}", min(1.0, 2 * share))

    return files


def squad(data: Path, work: Path, share: float) -> tuple[Path, Path]:
    return articles(find(data, "squad/train.json"), work, share)


def scifact(data: Path, work: Path, share: float) -> tuple[Path, None]:
    return part_of_beir(data / "scifact", work / "beir", share) if share < 1 else data / "scifact", None


CASES = {
    "SST-2": Case(
        "classify",
        one_file("sst2/train.tsv", partial(some_lines, has_header=True)),
        "accuracy",
        share=0.035,
        reduced={"epochs": 1, "learning_rate": 1e-4},
        full={"epochs": 1, "learning_rate": 1e-4},
    ),
    "Banking77": Case(
        "classify",
        one_file("banking77/train.csv", some_classes),
        "accuracy",
        share=0.1,
        reduced={"epochs": 2, "learning_rate": 2e-4},
        full={"epochs": 5, "learning_rate": 2e-4},
    ),
    "WNUT-17": Case(
        "tag",
        two_files("wnut17/{}.conll", some_sentences),
        "f1",
        share=0.1,
        reduced={"epochs": 3, "learning_rate": 3e-4, "batch_size": 16},
        full={"epochs": 3, "learning_rate": 3e-4},
        settings={"repair": True},
    ),
    "STS-B": Case(
        "match",
        two_files("stsb/{}.csv", partial(some_lines, has_header=False)),
        "spearman",
        share=0.12,
        reduced={"epochs": 1},
        full={"epochs": 1},
        settings={"columns": {"sentence1": "1", "sentence2": "2", "score": "3"}},
        before=True,
    ),
    "SQuAD": Case(
        "qa",
        squad,
        "f1",
        share=0.01,
        reduced={"epochs": 2, "learning_rate": 1e-4},
        full={"epochs": 1, "learning_rate": 2e-4},
    ),
    "SciFact": Case(
        "retrieve",
        scifact,
        "ndcg@10",
        share=0.04,
        reduced={"epochs": 2},
        full={"epochs": 1},
        held_out=0.3,
        before=True,
    ),
}


# ---- one run, in a process of its own --------------------------------------------------------------------------------


def run_once(options: argparse.Namespace) -> None:
    """Fine-tunes and predicts; writes what was found to --json."""
    torch.set_num_threads(options.threads)
    case = CASES[options.case]
    work = options.json.with_suffix("")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    train, dev = case.files(options.data, work, 1.0 if options.full else case.share)
    task = task_named(case.task).of_settings(case.settings)
    sources = Sources(model=str(options.model), train=train, dev=dev, held_out=case.held_out)
    loop = case.full if options.full else case.reduced
    training = Training(**{**task.training, **loop, "seed": options.seed})
    device = torch.device("cpu")
    outcome = finetune(task, sources, work / "out", training, before=case.before, device=device)
    tuned = open_model(work / "out", device=device)
    examples = tuned.task.read(dev or train)[: INFERRED if options.full else 300]
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        tuned.predict(examples)
        seconds.append(time.perf_counter() - start)
    result = {
        "measures": outcome.measures,
        "before": outcome.before,
        "examples": outcome.examples,
        "steps_seconds": outcome.steps_seconds,
        "seconds": outcome.seconds,
        "inference_seconds": statistics.median(seconds),
        "inferred": len(examples),
    }
    shutil.rmtree(work)
    write_json(options.json, result)


# ---- the whole -------------------------------------------------------------------------------------------------------


def in_a_process(options: argparse.Namespace, case: str, side: str, seed: int) -> dict[str, Any]:
    """What one run says; what is in --work already is not done again."""
    form = "full" if options.full else "reduced"
    file = options.work / f"{case}-{side}-{seed}-{form}.json"
    if not file.exists():
        command = [sys.executable, "-m", "benchmarks.tasks", *sys.argv[1:]]
        command += ["--case", case, "--seed", str(seed), "--json", str(file.resolve())]
        switch = {"BERT_FAST": "off"} if side == PLAIN else {}
        done = subprocess.run(command, env={**os.environ, **switch}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{case}, {side}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def runs(options: argparse.Namespace, case: str) -> Iterator[dict[str, Any]]:
    """Both sides for each seed, in turns."""
    for number, seed in enumerate(options.seeds):
        sides = (OURS, PLAIN) if number % 2 == 0 else (PLAIN, OURS)
        found = {side: in_a_process(options, case, side, seed) for side in sides}
        yield {"seed": seed, "sides": found}


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def show(console: Console, case: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table: the measure of both sides and the ratios of times, medians over seeds."""
    measure = CASES[case].measure

    def values(side: str, name: str) -> list[float]:
        return [run["sides"][side][name] for run in found]

    def measures(side: str) -> str:
        return spread([run["sides"][side]["measures"][measure] for run in found])

    def ratio(name: str) -> str:
        return f"{statistics.median(b / a for a, b in zip(values(OURS, name), values(PLAIN, name), strict=True)):.1f}x"

    before = found[0]["sides"][OURS]["before"].get(measure)
    minutes = "{:.1f} / {:.1f} min".format(*(statistics.median(values(side, "seconds")) / 60 for side in (OURS, PLAIN)))
    row = [
        f"{case}, {measure}",
        "" if before is None else f"{before:.4f}",
        measures(OURS),
        measures(PLAIN),
        minutes,
        ratio("steps_seconds"),
        ratio("inference_seconds"),
    ]
    console.print("  ".join(row), markup=False, highlight=False)
    return row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--model", type=Path, default=demo_folder(), help="the start; default: all-MiniLM-L6-v2")
    parser.add_argument("--work", type=Path, default=Path("build/tasks"))
    parser.add_argument("--out", type=Path, help=f"default: {OUT}, or {FULL} with --full")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--full", action="store_true", help="all of the data: hours for the plain side")
    parser.add_argument("--threads", type=int, default=2)
    for hidden in ("--case", "--seed", "--json"):
        kind: Any = {"--seed": int, "--json": Path}.get(hidden, str)
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.case:
        run_once(options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    console = Console()
    shown = Table(
        "", "before", OURS, PLAIN, "all of it", "training: ratio", "inference: ratio", box=box.SIMPLE, pad_edge=False
    )
    out = options.out or (FULL if options.full else OUT)
    for case in options.only:
        record = heading(PACKAGES, is_dry=False)
        record["runs"] = list(runs(options, case))
        # Of training: what stood in --work already took its time, too.
        record["minutes"] = sum(side["seconds"] for run in record["runs"] for side in run["sides"].values()) / 60
        shown.add_row(*show(console, case, record["runs"]))
        others = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        write_json(out, {**others, case: record})
    console.print(shown)


if __name__ == "__main__":
    main()

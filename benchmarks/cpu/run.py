"""One run: the conversions in one process, then, for each number of threads, one that has the contenders' processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..facts import heading, write_json
from .contenders import Field
from .convert import BASE, MINILM, convert
from .measure import Bench
from .peers import Place
from .report import Record, show
from .rows import ACCURACY, Row, rows

PACKAGES = (
    "bert-fast", "torch", "transformers", "numpy", "onnx", "onnxruntime", "openvino", "nncf", "ctranslate2",
    "sentence-transformers", "scipy",
)  # fmt: skip


def environment(threads: int, folder: Path, flags: Sequence[str]) -> dict[str, str]:
    """What libraries read when they are imported."""
    found = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "NNCF_CI": "1",  # no telemetry
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{threads}"),  # empty, so that compile times are true
    }
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags):
        found["CT2_FORCE_CPU_ISA"] = "AVX512"  # CTranslate2 takes AVX2 on processors that are not Intel's
    return found


# ---- in a process of its own -----------------------------------------------------------------------------------------


def run_row(bench: Bench, row: Row) -> Record:
    """The row's record, whatever happens in it."""
    record = Record(row.name, row.model)
    try:
        row.run(bench, record)
    except Exception:
        record.problem = traceback.format_exc()
    return record


def measure_rows(
    root: Path, part: Path, names: Sequence[str], threads: int, deadline: float, is_dry: bool, stsb: Path | None
) -> None:
    """Measures the rows with these names, and writes `part` after each."""
    from bert_fast import _C

    torch.set_num_threads(threads)
    console = Console(width=150)
    found: dict[str, Any] = {"threads": threads, "instruction_set": _C.instruction_set(), "engines": {}, "rows": []}
    found["not_run"] = list(names)
    field: Field | None = None
    try:
        for row in rows(stsb):
            if row.name not in names or (time.time() > deadline and not is_dry):
                continue
            if field is None or field.place.name != row.model:
                if field is not None:
                    field.close()
                field = Field(Place(root, row.model, threads, is_dry))
            record = run_row(Bench(field, deadline), row)
            console.print(
                f"{threads} thread{'s' * (threads > 1)}  {row.name}: {outcome(record)}", markup=False, highlight=False
            )
            found["rows"].append(record.to_dict())
            found["not_run"].remove(row.name)
            found["engines"][row.model] = field.facts()
            write_json(part, without_paths(found))
        write_json(part, without_paths(found))
    finally:
        if field is not None:
            field.close()


def without_paths(content: Any) -> Any:
    """The same with files named by their last part: messages and tracebacks say where things lie on this machine."""
    return json.loads(re.sub(r"(?<![\w:/])(?:/[\w.+-]+)+/", "", json.dumps(content)))


def outcome(record: Record) -> str:
    """A line for the console."""
    if record.problem is not None:
        return f"wrong: {record.problem.strip().splitlines()[-1]}"
    return record.reason or f"{record.rounds} rounds"


# ---- the run ---------------------------------------------------------------------------------------------------------


def in_process(target: Callable[..., None], *arguments: Any) -> str | None:
    """Runs a function in a fresh process. Gives None, or how it ended."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
    return None if process.exitcode == 0 else f"the process ended with status {process.exitcode}"


def run(
    out: Path, threads: Sequence[int], chosen: Sequence[Row], minutes: float, is_dry: bool, stsb: Path | None
) -> bool:
    """
    Args:
        out: receives the result.
        threads: numbers of threads, measured one after another.
        chosen: rows to measure.
        minutes: after which no row is begun.
        is_dry: tiny sizes, one round.
        stsb: see rows.accuracy.

    Returns:
        Whether nothing is wrong.
    """
    started = time.time()
    result = heading(PACKAGES, is_dry)
    device = result["device"]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        models = [model for model in (MINILM, BASE) if any(row.model == model for row in chosen)]
        os.environ.update(environment(max(threads), root, device["flags"]))
        if (end := in_process(convert, root, models, is_dry)) is not None:
            raise RuntimeError(f"the models could not be written: {end}")
        for count in threads:
            # The scores do not depend on the threads.
            names = [row.name for row in chosen if row.what != ACCURACY or count == max(threads)]
            part = root / f"threads-{count}.json"
            write_json(part, {"threads": count, "instruction_set": None, "engines": {}, "rows": [], "not_run": names})
            os.environ.update(environment(count, root, device["flags"]))
            end = in_process(measure_rows, root, part, names, count, started + 60 * minutes, is_dry, stsb)
            found = json.loads(part.read_text(encoding="utf-8"))
            result["runs"].append({**found, "problem": end})
            device["instruction_set"] = found["instruction_set"]
            result["minutes"] = (time.time() - started) / 60
            write_json(out, result)
    show(result, Console(width=190))
    return not any(found["problem"] or any(row["problem"] for row in found["rows"]) for found in result["runs"])

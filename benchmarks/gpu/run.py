"""One run: the tests, the ceilings, the cases, and a report that is whole after each of them."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console

from bert_fast import ops

from . import report as reports
from .cases import CASES, Case
from .measure import MAX_ROUNDS, Bench, Skip, measure_ceilings
from .report import Record, Report

ROOT = Path(__file__).resolve().parents[2]


def make_bench(is_dry: bool, deadline: float, max_rounds: int = MAX_ROUNDS) -> Bench:
    """Dry: float32, since tl.dot of bfloat16 is wrong in Triton's interpreter."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    device, dtype = ("cpu", torch.float32) if is_dry else ("cuda", torch.bfloat16)
    return Bench(torch.device(device), dtype, is_dry, deadline, max_rounds=max_rounds)


@contextmanager
def place(bench: Bench) -> Iterator[None]:
    """On a CPU the Triton kernels have to be asked for."""
    with ExitStack() as stack:
        if bench.is_dry:
            stack.enter_context(ops.forced_path("triton"))
        yield


# ---- the tests -------------------------------------------------------------------------------------------------------


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a process that leads a session of its own, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def compiling_beside() -> Iterator[None]:
    """While the tests run, a second process runs each case once, so that the disk caches hold what they compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", folder, "--no-tests", "--rounds", "1"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield
        finally:
            _end(process)


def run_tests(folder: Path, seconds: float, command: Sequence[str] | None = None) -> dict[str, Any]:
    """The GPU tests, their output in tests.txt and tests.xml.

    Returns:
        passed, summary, seconds and the names of the first failures.
    """
    results = folder / "tests.xml"
    if command is None:
        command = [
            sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-q", f"--junitxml={results}",
        ]  # fmt: skip
    start = time.monotonic()
    with (folder / "tests.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    lines = (folder / "tests.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    summary = lines[-1].strip("= ") if lines else "no output"
    if code is None:
        progress = "".join(re.findall(r"^[.FEsxX]+", "\n".join(lines), re.MULTILINE))
        summary = f"stopped after {seconds:.0f} s: {progress.count('.')} passed, {progress.count('F')} failed"
    return {
        "passed": code == 0,
        "summary": summary,
        "seconds": time.monotonic() - start,
        "failures": _failures(results),
    }


def _failures(results: Path, limit: int = 30) -> list[str]:
    """Test and message, of the first that failed."""
    if not results.is_file():
        return []
    found = []
    for case in ElementTree.parse(results).iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            found.append(f"{case.get('classname')}::{case.get('name')}: {(problem.get('message') or '')[:300]}")
    return found[:limit]


# ---- the cases -------------------------------------------------------------------------------------------------------


def run_case(bench: Bench, case: Case) -> Record:
    """The case's record, whatever happens in it."""
    record = Record(case.row, case.name)
    try:
        with place(bench):
            case.run(bench, record)
    except Skip as skip:
        record.reason = str(skip)
    except Exception:
        record.traceback = traceback.format_exc()
    finally:
        torch._dynamo.reset()  # a compiled peer starts anew in every case, whatever shapes the last had
        gc.collect()
        if bench.is_cuda:
            torch.cuda.empty_cache()
    return record


def run_cases(
    bench: Bench, report: Report, cases: Sequence[Case], folder: Path, started: float, console: Console
) -> None:
    """Fills the report and writes it after each case; ends early, and cleanly, when the time is used up."""
    for index, case in enumerate(cases):
        if not bench.has_time(0.0 if bench.is_dry else case.seconds):
            report.not_run = [f"{late.row}: {late.name}" for late in cases[index:]]
            break
        record = run_case(bench, case)
        console.print(
            f"{time.monotonic() - started:5.0f} s  {record.name}: {record.status}", markup=False, highlight=False
        )
        report.cases.append(record)
        report.minutes = (time.monotonic() - started) / 60
        report.write(folder)
    report.write(folder)


def run(
    folder: Path,
    minutes: float,
    is_dry: bool,
    cases: Sequence[Case],
    has_tests: bool,
    max_rounds: int,
    console: Console,
) -> bool:
    """
    Args:
        folder: receives the report.
        minutes: after which nothing new is begun.
        is_dry: see Bench.
        cases: to measure.
        has_tests: whether pytest runs first.
        max_rounds: counted rounds of a measurement.
        console: receives the table.

    Returns:
        Whether nothing is wrong.
    """
    started = time.monotonic()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = make_bench(is_dry, started + 60 * minutes, max_rounds)
    report = Report("dry run" if is_dry else torch.cuda.get_device_name(bench.device), reports.facts())
    if has_tests:
        with ExitStack() as stack:
            if cases is CASES:
                stack.enter_context(compiling_beside())
            report.tests = run_tests(folder, min(240.0, 60 * minutes * 0.45))
        console.print(f"tests: {report.tests['summary']}", markup=False)
    measure_ceilings(bench)
    report.ceilings = bench.ceilings
    report.write(folder)
    run_cases(bench, report, cases, folder, started, console)
    report.show(console)
    return not report.has_failed

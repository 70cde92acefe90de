"""benchmarks.families: every row in a dry run, and what it refuses to time."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import one_thread  # noqa: F401
from torch import nn

pytest.importorskip("transformers")

import bert_fast
from benchmarks import families
from benchmarks.cpu.contenders import Field
from benchmarks.cpu.measure import Bench
from benchmarks.cpu.peers import SDPA, Place
from benchmarks.cpu.report import OURS, Record
from benchmarks.cpu.run import run_row
from benchmarks.families import INFERENCE, KINDS, LONG, RAGGED, SIZES, TORCH, TRAINING, chosen, main, rows
from bert_fast.swap import core

ROOT = Path(__file__).resolve().parents[1]

# The weights that make values, each family's first; of one matrix for three, its last row is among them.
VALUES = re.compile(r"(v_lin|value|attn\.v|Wqkv|in_proj)[._]weight")


def found_by(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.families", "--dry", "--threads", "1", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error::UserWarning:bert_fast"},
        capture_output=True,
        text=True,
        check=False,
    )


def only_record(name: str) -> Record:
    """Of the row with this name, in a dry run."""
    (row,) = (row for row in rows() if row.name == name)
    return run_row(Bench(Field(Place(Path(), "families", 1, True)), math.inf), row)


# ---- the script ------------------------------------------------------------------------------------------------------


def test_every_family_is_here() -> None:
    """A layer of torch.nn alone is what its encoder is made of."""
    names = {kind.name.partition(" (")[0] for kind in KINDS}
    assert names == {family.name for family in core.FAMILIES} - {"torch.nn.TransformerEncoderLayer"}


def test_dry_run_measures_every_row(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = found_by("--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nested tensors" not in done.stderr
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
        assert re.search(rf"^\| {re.escape(row['model'])} .* [0-9.]+x \|$", done.stdout, re.MULTILINE)


def check_row(row: dict[str, Any]) -> None:
    assert row["problem"] is None, row["problem"]
    assert row["rounds"] == 1
    ours, peer = row["entries"]
    expected = {"MPNet": "transformers eager"}.get(row["model"], TORCH if TORCH in row["model"] else SDPA)
    assert (ours["name"], peer["name"]) == (OURS, expected)
    assert ours["seconds"] > 0
    assert len(peer["quartiles"]) == 3
    assert peer["ratio"] == pytest.approx(peer["seconds"] / ours["seconds"])
    facts = row["facts"]
    dry = LONG.dry if "long" in row["model"] else RAGGED.dry
    assert (facts["texts"], facts["useful_tokens"]) == (len(dry), sum(dry))
    assert facts["padding"] == pytest.approx(len(dry) * max(dry) / sum(dry))
    assert SIZES.keys() < facts.keys()
    assert facts["bert_fast_calls"].keys() == {"fast"}
    if row["name"].endswith(TRAINING):
        assert facts["dropout"] == (0.0 if "ModernBERT" in row["model"] else 0.2 if "Distil" in row["model"] else 0.1)
    else:
        assert 0 < ours["difference"] < 1e-5
        assert ours["cosine"] > 0.9999
        assert ("torch_fast_path" in facts) is (TORCH in row["model"])


@pytest.mark.parametrize("order", ["post", "pre"])
def test_torch_takes_its_own_fast_path(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"torch.nn.TransformerEncoder ({order}-norm): {INFERENCE}"
    record = only_record(name)
    assert record.problem is None
    assert record.facts["torch_fast_path"] == {"layers": 1, "nested": order == "post"}
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    record = only_record(name)
    assert record.problem == f"{TORCH} did not take its own fast path"
    assert record.rounds == 0


# ---- what is refused -------------------------------------------------------------------------------------------------


def swapped_and(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], nn.Module]:
    swap = bert_fast.swap

    def swap_and_change(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            change(swap(model))
        return model

    return swap_and_change


@pytest.mark.parametrize("name", [row.name for row in rows() if "long" not in row.name])
def test_other_weights_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model's answers or gradients differ nothing is timed."""

    def change(model: Any) -> None:
        values = next(parameter for key, parameter in model.named_parameters() if VALUES.search(key))
        values[-1].mul_(1.1)

    monkeypatch.setattr(bert_fast, "swap", swapped_and(change))
    record = only_record(name)
    assert record.problem is not None
    assert record.rounds == 0
    assert all(entry.seconds is None for entry in record.entries)


@pytest.mark.parametrize("what", [INFERENCE, TRAINING])
def test_other_paths_are_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert_fast, "swap", lambda model: model)
    record = only_record(f"BERT: {what}")
    assert record.problem == f"{OURS} took other paths than the fast one: {{}}"


def test_a_problem_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bert_fast, "swap", swapped_and(lambda model: next(model.parameters()).mul_(1.5)))
    out = tmp_path / "found.json"
    assert main(["--dry", "--only", "ELECTRA: inference", "--threads", "1", "--out", str(out)]) == 1
    assert "ELECTRA: inference: wrong: bert_fast: wrong: differs by" in capsys.readouterr().out
    (row,) = json.loads(out.read_text(encoding="utf-8"))["runs"][0]["rows"]
    assert row["problem"].startswith("bert_fast: wrong: differs by")
    assert row["entries"][1]["ratio"] is None


# ---- options ---------------------------------------------------------------------------------------------------------


def test_rows_are_chosen_by_family_or_word() -> None:
    assert len({row.name for row in rows()}) == len(rows())
    assert {row.model for row in chosen(["bert"])} == {"BERT"}
    assert {row.model for row in chosen(["ModernBERT", "mpnet"])} == {"ModernBERT", "ModernBERT, long texts", "MPNet"}
    assert [row.name for row in chosen(["long texts: TRAIN"])] == [f"ModernBERT, long texts: {TRAINING}"]
    assert len(chosen([])) == len(rows())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nonsense"], "no row's name contains nonsense"),
        (["--threads", "0"], "'0' is no number above 0"),
        (["--rounds", "31"], "'31' is above 30"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--dry", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_lengths_and_padding() -> None:
    """The workloads of full size: as long as they are meant to be, padded with the model's own id."""
    assert (len(RAGGED.lengths), int(RAGGED.lengths.min()) >= 4, int(RAGGED.lengths.max()) <= 256) == (64, True, True)
    assert 512 < int(LONG.lengths.max()) <= 1024
    (kind,) = (kind for kind in KINDS if kind.name == "RoBERTa")
    model = kind.make(True)
    for batch, lengths in zip(RAGGED.batches(model, False), RAGGED.lengths.split(32), strict=True):
        assert torch.equal(batch["attention_mask"].sum(1), lengths)
        assert torch.equal(batch["input_ids"] == 1, batch["attention_mask"] == 0)
    assert families.contenders(kind, True)[OURS].config.vocab_size == 50265

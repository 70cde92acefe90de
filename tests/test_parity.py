"""The parity table: its figures are those of the models, a wrong answer shows, and the original path needs a reason."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import one_thread, transformers  # noqa: F401
from test_cli import Run, run  # noqa: F401
from torch import Tensor, nn

import bert_fast
from bert_fast import engine, masking
from bert_fast import nn as fast
from bert_fast.swap import bert_shaped, core, parity
from bert_fast.swap.family import Family
from bert_fast.swap.parity import EVAL, TRAIN, Parity, Row, lines, markdown, rows_of
from bert_fast.swap.samples import SCATTERED, Sample, is_of_transformers, model_classes, samples
from bert_fast.swap.verify import FACTOR, UNITS

ROOT = Path(__file__).resolve().parents[1]

BY_NAME = {family.name: family for family in core.FAMILIES}

ALL = [sample for family in core.FAMILIES for sample in samples(family)]

each_sample = pytest.mark.parametrize("sample", ALL, ids=lambda sample: sample.name.replace(" ", "_"))


def sample_of(name: str) -> Sample:
    return next(sample for sample in ALL if sample.name == name)


def rows_for(name: str) -> dict[tuple[str, str], Row]:
    return {(row.dtype, row.mode): row for row in rows_of(sample_of(name))}


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_every_class_is_here() -> None:
    for family in core.FAMILIES:
        names = {sample.name for sample in samples(family)}
        assert len(names) == len(samples(family))
        if is_of_transformers(family):
            heads = {name for name in family.kept_rows if hasattr(transformers, name)}
            assert {family.encoder} | heads <= {cls.__name__ for cls in model_classes(family)} <= names


def rates(model: nn.Module) -> Iterator[float]:
    """Of all dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module.p
        for name in ("dropout", "attention_dropout", "dropout_prob"):
            rate = getattr(module, name, None)
            if isinstance(rate, float):
                yield rate


@pytest.mark.parametrize("family", core.FAMILIES, ids=lambda family: family.name)
def test_samples(family: Family) -> None:
    """No dropout, no default weights, labels for every head, texts of many lengths."""
    for sample in samples(family):
        model = sample.make()
        assert not any(rates(model)), sample.name
        for name, parameter in model.named_parameters():
            assert parameter.numel() == 1 or parameter.std() > 0, name
        batch, tokens = sample.batch(model)
        assert len(set(tokens.flatten(0, -2).sum(1).tolist())) > 5
        if is_of_transformers(family) and sample.name.partition(",")[0] != family.encoder:
            with torch.no_grad():
                assert math.isfinite(model(**batch).loss), sample.name
    again = sample.make().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_scattered() -> None:
    tokens = sample_of(f"BertModel, {SCATTERED}").tokens()
    starts = tokens.long().argmax(1)
    is_whole = tokens.sum(1) == tokens.shape[1] - starts - tokens.flip(1).long().argmax(1)
    assert tokens.any(1).all()
    assert bool((starts > 0).any())
    assert not bool(is_whole.all())


# ---- the figures -----------------------------------------------------------------------------------------------------


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), torch.cat([x.grad.flatten() for x in model.parameters()])


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_figures(dtype: torch.dtype) -> None:
    """By hand, for a head whose parameters all have gradients."""
    name = str(dtype).removeprefix("torch.")
    sample = sample_of("DistilBertForTokenClassification")
    original: Any = sample.make().to(dtype)
    batch, tokens = sample.batch(original)
    exact, swapped = copy.deepcopy(original).double(), bert_fast.swap(copy.deepcopy(original))
    found = rows_for(sample.name)

    with torch.no_grad():
        ours, theirs, truth = (model(**batch).logits[tokens] for model in (swapped, original, exact))
    logits = found[name, EVAL].of("logits")
    assert logits.error == pytest.approx(relative(ours, truth), rel=1e-4)
    assert logits.original_error == pytest.approx(relative(theirs, truth), rel=1e-4)
    assert logits.bound == FACTOR * logits.original_error + UNITS * torch.finfo(dtype).eps
    assert found[name, EVAL].error == max(logits.error, found[name, EVAL].of("loss").error)

    ours, theirs, truth = (loss_and_gradients(model, batch)[1] for model in (swapped, original, exact))
    gradients = found[name, TRAIN].of("gradients")
    assert gradients.error == pytest.approx(relative(ours, truth), rel=1e-4)
    assert gradients.original_error == pytest.approx(relative(theirs, truth), rel=1e-4)
    assert found[name, TRAIN].ratio == found[name, TRAIN].error / found[name, TRAIN].original_error
    assert {x.name for x in found[name, TRAIN].figures} == {"loss", "gradients"}


def test_as_verify_says() -> None:
    """The same figures as verify's, relative to the largest value."""
    sample = sample_of("BertForSequenceClassification")
    model = bert_fast.swap(sample.make())
    batch, _ = sample.batch(model)
    checks = {check.name: check for check in bert_fast.verify(model, batch).checks}
    with torch.no_grad():
        truth = sample.make().double()(**batch).logits.abs().max().item()
    logits = rows_for(sample.name)["float32", EVAL].of("logits")
    assert logits.error * truth == pytest.approx(checks["logits"].error, rel=1e-3)
    assert logits.original_error * truth == pytest.approx(checks["logits"].original_error, rel=1e-3)
    assert logits.bound * truth == pytest.approx(checks["logits"].bound, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ElectraForPreTraining", torch.float32),  # its scores of tokens have two dimensions
        ("ElectraForCausalLM", torch.bfloat16),  # its loss is in float32
        ("ModernBertForQuestionAnswering", torch.bfloat16),
    ],
)
def test_verify_agrees(name: str, dtype: torch.dtype) -> None:
    sample = sample_of(name)
    model = sample.make()
    batch, _ = sample.batch(model)
    assert bert_fast.verify(bert_fast.swap(model.to(dtype)), batch).is_within


@each_sample
def test_float32(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "DTYPES", parity.DTYPES[:1])
    monkeypatch.setattr(parity, "NAMES", parity.NAMES[:1])
    evaluation, training = rows_of(sample)
    assert Parity((evaluation, training)).is_right, lines([evaluation, training])
    if sample.listed is None:
        assert evaluation.reason is None
        assert 0 < evaluation.error <= 1e-5
        assert training.error > 0


# ---- what is wrong shows ---------------------------------------------------------------------------------------------


def wrong_engine(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Each feature gets a share of its neighbour."""
    real = engine.encode

    def encode(*args: Any, **others: Any) -> Any:
        outputs = real(*args, **others)
        return None if outputs is None else [x + share * x.roll(1, -1) for x in outputs]

    monkeypatch.setattr(engine, "encode", encode)


@pytest.mark.parametrize("share", [1e-4, math.nan])
@pytest.mark.parametrize("name", ["RobertaModel", "ElectraForPreTraining", "ModernBertForQuestionAnswering"])
def test_wrong_answer(monkeypatch: pytest.MonkeyPatch, name: str, share: float) -> None:
    wrong_engine(monkeypatch, share)
    found = rows_for(name)
    assert not found["float32", EVAL].is_within
    assert found["float32", TRAIN].is_within  # not the engine's
    assert not Parity(tuple(found.values())).is_right
    (float32, _), *_ = lines(found.values()).values()
    assert not float32.is_right
    assert "eval out of bounds" in float32.cells[-1]
    assert "train out of bounds" not in float32.cells[-1]


def test_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers stay right."""
    real = fast.encoder_layer

    def encoder_layer(*args: Any, **others: Any) -> Tensor:
        output: Tensor = real(*args, **others)
        return output + 1e-4 * (output - output.detach())

    monkeypatch.setattr(fast, "encoder_layer", encoder_layer)
    found = rows_for("MPNetForMaskedLM")
    assert found["float32", EVAL].is_within
    assert not found["float32", TRAIN].of("gradients").is_within
    assert found["float32", TRAIN].of("loss").is_within
    assert not found["float32", TRAIN].is_within


def test_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that sees hidden tokens."""

    def unpad(mask: Tensor, **others: Any) -> Any:
        return masking.unpad(torch.ones_like(mask), **others)

    monkeypatch.setattr(bert_shaped, "unpad", unpad)
    found = rows_for("CamembertForSequenceClassification")
    assert not found["float32", EVAL].is_within
    assert not found["float32", TRAIN].is_within
    assert not found["bfloat16", EVAL].is_within


def test_other_shape_or_dtype_or_none() -> None:
    exact = torch.ones(3, 1, dtype=torch.float64)
    for ours in (torch.ones(1, 1), torch.ones(3, 1, dtype=torch.float64), None):
        assert parity._figures("x", ours, exact.float(), exact, 1.0).error == math.inf
    assert parity._figures("x", exact.float(), exact.float(), exact, 1.0).error == 0.0


class Ours(nn.Module):
    """Has a step of its own, and so is nobody that swap knows."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(encoder.layers[0].linear1.weight[0].detach().clone())

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:  # noqa: ARG002
        return src * self.weight


# ---- the original path -----------------------------------------------------------------------------------------------


def test_listed_reasons() -> None:
    for name in ("BertLMHeadModel, is_decoder=True", f"MPNetModel, {SCATTERED}"):
        found = rows_for(name)
        assert Parity(tuple(found.values())).is_right
        for row in found.values():
            assert row.reason in (row.listed, None)
            assert row.reason is None or row.ratio == 1.0
    assert rows_for("BertLMHeadModel, is_decoder=True")["float32", EVAL].reason == "the model is a decoder"


def test_unlisted_reason() -> None:
    sample = replace(sample_of("BertLMHeadModel, is_decoder=True"), listed=None)
    found = list(rows_of(sample))
    assert all(row.is_within for row in found)
    assert not any(row.is_explained for row in found)
    assert not Parity(tuple(found)).is_right
    (line, _), *_ = lines(found).values()
    assert line.cells[-1] == "original: the model is a decoder; not listed"
    assert not line.is_right


def test_another_reason_than_the_listed() -> None:
    sample = replace(sample_of("BertLMHeadModel, is_decoder=True"), listed="it rains")
    assert not Parity(tuple(rows_of(sample))).is_right


def test_class_without_a_known_encoder() -> None:
    sample = sample_of("TransformerEncoder, any mask")
    model: Any = sample.make()
    ours = replace(sample, name="Ours", make=lambda: Ours(model))
    for row in rows_of(ours):
        assert row.reason == "no known encoder was called"
        assert row.ratio == 1.0
        assert not row.is_explained


def test_nothing_is_not_right() -> None:
    assert not Parity(()).is_right


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """The table of four models."""
    names = (
        "MPNetModel",
        f"MPNetModel, {SCATTERED}",
        "MPNetForTokenClassification",
        "TransformerEncoderLayer, any mask",
    )
    kept = [sample_of(name) for name in names]
    monkeypatch.setattr(parity, "samples", lambda family: [x for x in kept if x.family is family])
    return kept


def test_command(run: Run, few: list[Sample], tmp_path: Path) -> None:  # noqa: F811
    table, figures = tmp_path / "table.md", tmp_path / "figures.json"
    result = run("verify", "--all", "--markdown", str(table), "--json", str(figures))
    assert result.status == 0, result.err
    assert "16 rows, all within bounds" in result.out
    content = json.loads(figures.read_text(encoding="utf-8"))
    assert content["is_right"] is True
    assert content["torch"] == torch.__version__
    assert content["transformers"] == transformers.__version__
    assert {"bert-fast", "instruction_set", "device", "factor", "units"} <= content.keys()
    assert len(content["rows"]) == 16
    expected = {row.model + row.dtype + row.mode: row for sample in few for row in rows_of(sample)}
    for row in content["rows"]:
        twin = expected[row["model"] + row["dtype"] + row["mode"]]
        for name in ("family", "reason", "listed", "error", "original_error", "ratio", "is_within", "is_explained"):
            assert row[name] == getattr(twin, name), name
        assert [x["name"] for x in row["figures"]] == [x.name for x in twin.figures]
        assert all({"error", "original_error", "bound"} <= x.keys() for x in row["figures"])
    text = table.read_text(encoding="utf-8")
    assert text == markdown(Parity(tuple(expected.values())))
    for sample in few:
        assert f"| {sample.name} | float32 | " in text
        assert sample.name in " ".join(result.out.split())
    assert "at\nmost 2 times torch's, in every family:" in text


def test_command_fails(run: Run, few: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001, F811
    wrong_engine(monkeypatch, math.nan)
    table, figures = tmp_path / "table.md", tmp_path / "figures.json"
    result = run("verify", "--all", "--markdown", str(table), "--json", str(figures))
    assert result.status == 1
    assert "6 lines are out of bounds" in result.out  # those on the fast path
    content = json.loads(figures.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["is_right"] is False
    assert sum(not row["is_within"] for row in content["rows"]) == 6
    text = table.read_text(encoding="utf-8")
    assert "**but for MPNet, torch.nn.TransformerEncoderLayer**" in text
    assert "**fast; eval out of bounds**" in text


def test_command_fails_without_a_reason(run: Run, few: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    unlisted = [replace(x, listed=None) for x in few if x.family.name == "MPNet"]
    monkeypatch.setattr(parity, "samples", lambda family: [x for x in unlisted if x.family is family])
    result = run("verify", "--all")
    assert result.status == 1
    assert "not listed" in " ".join(result.out.split())


@pytest.mark.parametrize(
    "arguments",
    [("--all", "."), ("--all", "--demo"), (".", "--json", "x.json"), ("--demo", "--markdown", "x.md"), ()],
)
def test_bad_arguments(run: Run, arguments: tuple[str, ...]) -> None:  # noqa: F811
    result = run("verify", *arguments)
    assert result.status == 2
    assert "--all" in result.only_line


def test_committed_table() -> None:
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    missing = [sample.name for sample in ALL if f"| {sample.name} | float32 | " not in text]
    assert missing == [], f"docs/parity.md is behind the code: {parity.COMMAND}"
    assert "**" not in text, "docs/parity.md shows figures out of bounds"

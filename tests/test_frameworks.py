"""Swapped models under what trains, wraps, compiles, exports and copies models: the answers of the original there."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    MIXED,
    SIZES,
    WHOLE,
    any_path,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    randomise,
    theirs,
    transformers,
)
from test_families import build as build_other
from test_families import prefix_of
from test_swap import LABELS, assert_identical, assert_same_output, calls
from tolerance import magnitude
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import bert_fast
from bert_fast.swap.core import Swapped

BERTS_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
DROPOUTS = {"DistilBert": ("dropout", "attention_dropout", "seq_classif_dropout")}

CLASSIFIERS = (
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "DistilBertForSequenceClassification",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]

each_classifier = pytest.mark.parametrize("name", CLASSIFIERS)


def build(name: str, dropout: float = 0.0, **config: Any) -> Any:
    """A tiny model of any family with random weights, in evaluation mode."""
    prefix = "Bert" if name.startswith("Bert") else prefix_of(name)
    config = {**dict.fromkeys(DROPOUTS.get(prefix, BERTS_DROPOUTS), dropout), **config}
    if prefix != "Bert":
        return build_other(name, **config)
    return theirs(name, **({"num_labels": 3} if name == "BertForSequenceClassification" else {}), **config)


def pair(name: str = "BertModel", **config: Any) -> tuple[Any, Any]:
    """A model and its swapped copy."""
    model = build(name, **config)
    return model, bert_fast.swap(copy.deepcopy(model))


def batch_for(name: str, rows: str = MIXED, seed: int = 1) -> dict[str, Tensor]:
    batch = inputs(mask_of(rows), seed)
    if name.startswith("DistilBert"):
        del batch["token_type_ids"]
    return batch


def labelled(name: str) -> dict[str, Tensor]:
    return batch_for(name) | LABELS[f"Bert{name[name.index('For') :]}"]


def optimize(model: Any, batches: list[dict[str, Tensor]], lr: float = 0.02) -> list[float]:
    """The losses of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_state(found: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    state = expected.state_dict()
    assert list(found.state_dict()) == list(state)
    for name, value in found.state_dict().items():
        assert_near(value, state[name], tolerance)


def assert_equal_state(found: nn.Module, expected: nn.Module) -> None:
    """Bit by bit."""
    state = expected.state_dict()
    assert list(found.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


def assert_losses(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) > 1
    assert max(expected) - min(expected) > 0.01, "nothing is learned"
    assert found == pytest.approx(expected, rel=1e-5)


# ---- transformers.Trainer --------------------------------------------------------------------------------------------


def texts(name: str, count: int = 13) -> list[dict[str, Any]]:
    """Of 1 to 13 tokens, with labels of a class, or of a third of the tokens."""
    generator = torch.Generator().manual_seed(2)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        ids = torch.randint(4, SIZES["vocab_size"], (1 + 5 * i % 13,), generator=generator)
        is_labelled = torch.rand(ids.shape, generator=generator) < 0.33
        is_labelled[0] = True
        rows.append({"input_ids": ids, "labels": i % 3 if "Sequence" in name else ids.masked_fill(~is_labelled, -100)})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=1),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else pad(labels, True, -100),
    }


class Recorder(transformers.Trainer):  # type: ignore[misc]
    """Keeps the losses, which the log rounds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def trainer(model: Any, folder: Path, **arguments: Any) -> Recorder:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    rows = texts(type(model).__name__)
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "no",
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 5,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 7,
    }
    return Recorder(
        model=model,
        args=transformers.TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:7],
        data_collator=collate,
    )


@pytest.mark.parametrize("name", [*CLASSIFIERS, "BertForMaskedLM", "ElectraForMaskedLM"])
def test_trainer(name: str, tmp_path: Path) -> None:
    trainers = [trainer(model, tmp_path) for model in pair(name)]
    for each in trainers:
        each.train()
    stock, swapped = trainers
    assert_losses(swapped.losses, stock.losses)
    assert swapped.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)
    if name in CLASSIFIERS:
        found, expected = (torch.from_numpy(each.predict(each.eval_dataset).predictions) for each in trainers)
        assert_near(found, expected)
    assert set(calls(swapped.model)) == {"fast"}

    swapped.save_model(str(tmp_path / "saved"))
    saved = getattr(transformers, name).from_pretrained(tmp_path / "saved")
    assert saved.config.architectures == [name]
    assert not any(isinstance(module, Swapped) for module in saved.modules())
    assert_equal_state(saved, swapped.model)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForSequenceClassification"])
def test_resumed_training(name: str, tmp_path: Path) -> None:
    """From a checkpoint on, it goes as it went without a break, and as the original does from that checkpoint."""
    _, swapped = pair(name)
    whole = trainer(swapped, tmp_path, save_strategy="steps", save_steps=4)
    whole.train()
    for number, model in enumerate(pair(name)):
        randomise(model, seed=8)
        resumed = trainer(model, tmp_path / str(number))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_losses(resumed.losses, whole.losses[4:])
    assert_equal_state(model, swapped)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"gradient_accumulation_steps": 2, "max_steps": 3}, "fast"),
        ({"label_smoothing_factor": 0.2}, "fast"),
        ({"neftune_noise_alpha": 5.0}, "embeddings.word_embeddings has hooks"),
        ({"gradient_checkpointing": True}, "gradient checkpointing is on"),
    ],
    ids=["accumulation", "smoothing", "noise", "checkpointing"],
)
def test_arguments_of_the_trainer(arguments: dict[str, Any], path: str, tmp_path: Path) -> None:
    losses = []
    for model in (models := pair("BertForMaskedLM")):
        with any_path():
            each = trainer(model, tmp_path, **arguments)
            each.train()
        losses.append(each.losses)
    assert_losses(losses[1], losses[0])
    assert list(calls(models[1])) == [path]


def test_compiled_by_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the Trainer leaves the wish to compile there
    model, swapped = pair("DistilBertForSequenceClassification")
    each = trainer(model, tmp_path, max_steps=2)
    compiled = trainer(swapped, tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="eager")
    each.train()
    compiled.train()
    assert_losses(compiled.losses, each.losses)


# ---- accelerate ------------------------------------------------------------------------------------------------------


def forget_accelerator(module: Any) -> None:
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """The package, whose state is one for the process."""
    module = pytest.importorskip("accelerate")
    forget_accelerator(module)
    yield module
    forget_accelerator(module)


def train_accelerated(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> list[float]:
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForSequenceClassification"])
def test_accelerate(name: str, accelerate: Any, tmp_path: Path) -> None:
    """Five batches, a step after every second; the state is saved, spoilt and loaded, and training goes on from it."""
    losses = []
    for model in (models := pair(name)):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared, optimizer, loader = accelerator.prepare(
            model,
            torch.optim.AdamW(model.parameters(), lr=3e-3),
            torch.utils.data.DataLoader(texts(name), batch_size=3, collate_fn=collate),  # type: ignore[arg-type]
        )
        before = train_accelerated(accelerator, prepared, optimizer, loader)
        accelerator.save_state(str(tmp_path))
        after = train_accelerated(accelerator, prepared, optimizer, loader)
        randomise(prepared, seed=8)
        accelerator.load_state(str(tmp_path))
        assert train_accelerated(accelerator, prepared, optimizer, loader) == after
        losses.append(before + after)
        assert accelerator.unwrap_model(prepared) is model
        accelerator.free_memory()
    assert_losses(losses[1], losses[0])
    assert set(calls(models[1])) == {"fast"}


@pytest.mark.parametrize("keeps_wrapper", [True, False])
def test_unwrapped_from_mixed_precision(keeps_wrapper: bool, accelerate: Any) -> None:
    """Accelerate hangs a forward under autocast on the model. Taken off again, the model is still swapped."""
    model, swapped = pair("BertForSequenceClassification")
    batch = batch_for("BertForSequenceClassification")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(swapped)
    with torch.no_grad():
        rounded, exact = prepared(**batch).logits, model(**batch).logits
        assert 1e-4 < magnitude(rounded - exact) < 0.2
        with torch.autocast("cpu", torch.bfloat16):
            theirs_rounded = model(**batch).logits
        assert magnitude(rounded - exact) < 2 * magnitude(theirs_rounded - exact)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keeps_wrapper)
        assert unwrapped is swapped
        expected = rounded if keeps_wrapper else bert_fast.swap(copy.deepcopy(model))(**batch).logits
        assert torch.equal(unwrapped(**batch).logits, expected)
    assert set(calls(swapped)) == {"fast"}


@pytest.mark.parametrize("is_wrapped", [True, False])
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_offloaded_weights(way: str, is_wrapped: bool, accelerate: Any, tmp_path: Path) -> None:
    """Weights that come when a module is called, and go again: what steps over modules would not find them."""
    model, swapped = pair("BertForSequenceClassification")
    batch = batch_for("BertForSequenceClassification")
    arguments = (str(tmp_path),) if way == "disk_offload" else ()
    if not is_wrapped:
        bert_fast.restore(swapped)
    getattr(accelerate, way)(swapped, *arguments, execution_device=torch.device("cpu"))
    if not is_wrapped:
        with pytest.raises(ValueError, match="before anything wraps it"):
            bert_fast.swap(swapped)
        return
    assert swapped.bert.encoder.layer[0].output.dense.weight.is_meta
    with torch.no_grad(), pytest.warns(UserWarning, match="has a forward of its own"):
        assert_identical(swapped(**batch), model(**batch))


# ---- PEFT ------------------------------------------------------------------------------------------------------------

LORA: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["query", "value"]},
    "all": {"target_modules": "all-linear", "use_dora": True},
    "embeddings": {"target_modules": ["word_embeddings", "dense"]},
    "tokens": {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [3, 5]}},
    "whole modules": {"target_modules": ["key"], "modules_to_save": ["classifier", "LayerNorm", "pooler"]},
    "parameters": {"target_parameters": ["bert.encoder.layer.1.output.dense.weight"], "target_modules": []},
}


def adapt(model: Any, **config: Any) -> Any:
    """With adapters of random weights, the same for the same configuration."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **config))


def tokens_of(rows: str = MIXED) -> Tensor:
    """(rows,) which of them have tokens."""
    return mask_of(rows).any(1)


@pytest.mark.parametrize("is_before", [True, False], ids=["swap first", "adapters first"])
@pytest.mark.parametrize("config", LORA.values(), ids=LORA)
def test_lora(config: dict[str, Any], is_before: bool) -> None:
    name = "BertForSequenceClassification"
    stock = adapt(build(name), **config)
    swapped = (
        adapt(bert_fast.swap(build(name)), **config) if is_before else bert_fast.swap(adapt(build(name), **config))
    )
    batch, has_tokens = labelled(name), tokens_of()
    for each in (stock, swapped):
        each.eval()
    expected = gradients(stock, stock(**batch).loss)
    assert_same_gradients(gradients(swapped, swapped(**batch).loss), expected)
    with torch.no_grad():
        adapted = stock(**batch).logits[has_tokens]
        assert_near(swapped(**batch).logits[has_tokens], adapted)
        with stock.disable_adapter(), swapped.disable_adapter():
            unadapted = stock(**batch).logits[has_tokens]
            assert magnitude(unadapted - adapted) > 0.01
            assert_near(swapped(**batch).logits[has_tokens], unadapted)
        merged = swapped.merge_and_unload()
        assert_near(merged(**batch).logits[has_tokens], adapted)
    assert calls(merged) == {"fast": 4}


def test_lora_after_calls() -> None:
    """What was found out about a model, and packed, is of no use once adapters are put in, merged and taken out."""
    name = "DistilBertForSequenceClassification"
    batch, has_tokens = batch_for(name), tokens_of()
    answers = []
    for model in (models := pair(name)):
        with torch.no_grad():
            logits = [model(**batch).logits]
            adapted = adapt(model, target_modules=["q_lin", "v_lin"]).eval()
            logits.append(adapted(**batch).logits)
            adapted.merge_adapter()
            logits.append(adapted(**batch).logits)
            adapted.unmerge_adapter()
            logits.append(adapted(**batch).logits)
            logits.append(adapted.unload()(**batch).logits)
        answers.append(torch.stack(logits)[:, has_tokens])
    assert_near(answers[1], answers[0])
    assert magnitude(answers[0][1] - answers[0][0]) > 0.01
    assert calls(models[1]) == {"fast": 5}


def test_adapters_are_saved_for_the_original(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    name = "BertForSequenceClassification"
    swapped = adapt(bert_fast.swap(build(name)), target_modules=["query", "value"])
    swapped.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    with torch.no_grad():
        found, expected = (model(**batch_for(name)).logits[tokens_of()] for model in (swapped, loaded))
    assert_near(found, expected)


def test_an_adapter_for_each_row() -> None:
    """It is given to hooks, which see rows of texts, not packed ones."""
    name = "BertForSequenceClassification"
    models = [adapt(model, target_modules=["query", "value"]) for model in pair(name)]
    for model in models:
        torch.manual_seed(4)
        model.add_adapter("other", model.peft_config["default"])
        model.eval()
    adapters = {"adapter_names": ["default", "other", "__base__", "default"] * 2}
    with torch.no_grad():
        expected = models[0](**batch_for(name), **adapters)
        assert magnitude(expected.logits - models[0](**batch_for(name)).logits) > 0.01
        with pytest.warns(UserWarning, match="query has hooks"):
            assert_identical(models[1](**batch_for(name), **adapters), expected)


@pytest.mark.parametrize(
    ("config", "arguments", "path"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 5, "task_type": "SEQ_CLS"}, "fast"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 5, "task_type": "SEQ_CLS"}, "past_key_values is given"),
        ("IA3Config", {"target_modules": ["query", "dense"], "feedforward_modules": ["dense"]}, "fast"),
    ],
)
def test_other_adapters(config: str, arguments: dict[str, Any], path: str) -> None:
    peft = pytest.importorskip("peft")
    name = "BertForSequenceClassification"
    torch.manual_seed(3)
    stock = peft.get_peft_model(build(name), getattr(peft, config)(**arguments)).eval()
    for parameter in stock.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    swapped = bert_fast.swap(copy.deepcopy(stock))
    batch = batch_for(name)
    labels = LABELS[name]["labels"].masked_fill(~tokens_of(), -100)
    with any_path():
        found = swapped(**batch, labels=labels)
    expected = stock(**batch, labels=labels)
    assert_near(found.logits[tokens_of()], expected.logits[tokens_of()])
    assert_same_gradients(gradients(swapped, found.loss), gradients(stock, expected.loss))
    assert calls(swapped) == {path: 1}


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


def enable_checkpointing(model: Any, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", [*CLASSIFIERS, "ElectraForMaskedLM"])
def test_checkpointed_layers(name: str, use_reentrant: bool) -> None:
    """With dropout: the original path draws what the original does."""
    batch = labelled(name)
    results = []
    for model in (models := pair(name, dropout=0.2)):
        enable_checkpointing(model, use_reentrant)
        torch.manual_seed(5)
        with any_path():
            results.append(gradients(model, model(**batch).loss))
    assert_same_gradients(results[1], results[0])
    assert calls(models[1]) == {"gradient checkpointing is on": 1}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_model(use_reentrant: bool) -> None:
    """The whole model is run again for its gradients, with the same dropout."""
    _, swapped = pair("BertForMaskedLM", dropout=0.2)
    swapped.train()
    batch = labelled("BertForMaskedLM")
    results = []
    for is_checkpointed in (False, True):
        embeds = swapped.bert.embeddings.word_embeddings(batch["input_ids"])

        def loss(embeds: Tensor) -> Tensor:
            result: Tensor = swapped(inputs_embeds=embeds, **{k: x for k, x in batch.items() if k != "input_ids"}).loss
            return result

        torch.manual_seed(5)
        value = checkpoint(loss, embeds, use_reentrant=use_reentrant) if is_checkpointed else loss(embeds)
        results.append(gradients(swapped, value))
    assert_same_gradients(results[1], results[0])
    assert calls(swapped) == {"fast": 3}


# ---- precision -------------------------------------------------------------------------------------------------------


@each_classifier
def test_there_and_back(name: str) -> None:
    """Through the precisions, each as the original is there, whatever was packed before."""
    models = pair(name)
    batch, has_tokens = batch_for(name), tokens_of()
    casts: tuple[Callable[[Any], Any], ...] = (
        lambda model: model,
        lambda model: model.double(),
        lambda model: model.float(),
        lambda model: model.half(),
        lambda model: model.to(torch.float32),
        lambda model: model.bfloat16(),
        lambda model: model.to(dtype=torch.float64),
        lambda model: model.float(),
    )
    with torch.no_grad():
        for cast in casts:
            stock, swapped = (cast(model) for model in models)
            found, expected = swapped(**batch).logits[has_tokens], stock(**batch).logits[has_tokens]
            assert found.dtype == expected.dtype
            coarse = expected.dtype in (torch.float16, torch.bfloat16)
            exact = copy.deepcopy(stock).double()(**batch).logits[has_tokens]
            bound = 2 * magnitude(expected - exact) if coarse else 1e-5 * max(1.0, magnitude(exact))
            assert magnitude(found - exact) <= bound
    assert calls(models[1]) == {"fast": len(casts)}


@each_classifier
def test_training_under_autocast(name: str) -> None:
    """Farther from training in float64 by no more than twice what the original is."""
    stock, swapped = pair(name)
    exact = copy.deepcopy(stock).double()
    batch = labelled(name)
    optimize(exact, [batch] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        for model in (stock, swapped):
            optimize(model, [batch] * 3)

    def distance(model: nn.Module) -> float:
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        return math.sqrt(sum(float((x.detach().double() - y.detach()).square().sum()) for x, y in pairs))

    assert distance(stock) > 1e-4
    assert distance(swapped) <= 2 * distance(stock)
    assert calls(swapped) == {"fast": 3}


# ---- compilers and exporters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "DistilBertModel", "ElectraForMaskedLM"])
def test_compiled(name: str) -> None:
    """BERT has tests of its own."""
    torch._dynamo.reset()
    model, swapped = pair(name)
    compiled: Any = torch.compile(swapped, backend="eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for rows in (MIXED, WHOLE, "1110000\n0111110\n1111111"):
            mask = mask_of(rows)
            assert_same_output(compiled(**batch_for(name, rows)), model(**batch_for(name, rows)), mask)


OTHER_ROWS = WHOLE + "1111000000000\n" * 4
"""Of the mixed batch's shape."""


def export(model: Any, batch: dict[str, Tensor]) -> Any:
    return torch.export.export(model, (), batch, strict=False).module()


def export_strictly(model: Any, batch: dict[str, Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects", UserWarning)
        return torch.export.export(model, (), batch, strict=True).module()


def trace(model: Any, batch: dict[str, Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer, about the original
        traced: Any = torch.jit.trace(model, example_kwarg_inputs=batch, strict=False)
    return traced


def trace_operators(model: Any, batch: dict[str, Tensor]) -> Any:
    """Without a mask: about that the original asks, and make_fx takes no questions."""
    batch = {name: x for name, x in batch.items() if name != "attention_mask"}
    traced = make_fx(lambda *args: model(**dict(zip(batch, args, strict=True)))[0])(*batch.values())
    return lambda **batch: (traced(*(x for name, x in batch.items() if name != "attention_mask")),)


RECORDED = [
    *itertools.product(("BertModel", "DistilBertModel"), (export, trace, trace_operators), (True, False)),
    ("BertModel", export_strictly, False),
]


@pytest.mark.parametrize(("name", "record", "has_grad"), RECORDED)
def test_recorded(name: str, record: Callable[[Any, dict[str, Tensor]], Any], has_grad: bool) -> None:
    """A recording serves other batches than the one that it was made with; of a restored model it is the original's."""
    model, swapped = pair(name)
    rows = (WHOLE * 2, WHOLE * 2) if record is trace_operators else (MIXED, OTHER_ROWS)
    batch, other = batch_for(name, rows[0]), batch_for(name, rows[1], seed=2)
    swapped(**batch)
    with torch.set_grad_enabled(has_grad):
        with any_path():
            recorded = record(swapped, batch)
        restored = record(bert_fast.restore(swapped), batch)
        for each in (batch, other):
            expected = model(**each)[0]
            for found in (recorded(**each), restored(**each)):
                hidden = found["last_hidden_state"] if isinstance(found, dict) else found[0]
                assert_near(
                    hidden[mask_of(rows[0] if each is batch else rows[1])], expected[each["attention_mask"] != 0]
                )


def onnx_bytes(model: Any, name: str, is_dynamo: bool) -> bytes:
    batch = batch_for(name)
    options: dict[str, Any] = {"dynamo": True, "verbose": False}
    if not is_dynamo:
        options = {"dynamo": False, "dynamic_axes": {key: {0: "batch", 1: "length"} for key in batch}}
    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about the original
        torch.onnx.export(model, (), file, kwargs=batch, input_names=list(batch), output_names=["logits"], **options)
    written: bytes = file.getvalue()
    return written


def without_traces(file: bytes) -> bytes:
    """The file but for the lines of Python that each of its nodes comes from."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(file)
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    result: bytes = model.SerializeToString(deterministic=True)
    return result


@pytest.mark.parametrize(
    ("name", "is_dynamo"),
    [
        ("BertForSequenceClassification", True),
        ("BertForSequenceClassification", False),
        ("DistilBertForSequenceClassification", False),
    ],
)
def test_onnx(name: str, is_dynamo: bool) -> None:
    """The file that the original gives: of a model that was swapped byte by byte, of one that is but for traces."""
    pytest.importorskip("onnx")
    if is_dynamo:
        pytest.importorskip("onnxscript")
    model, swapped = pair(name)
    swapped(**batch_for(name))
    expected = onnx_bytes(model, name, is_dynamo)
    assert without_traces(onnx_bytes(swapped, name, is_dynamo)) == without_traces(expected)
    assert onnx_bytes(bert_fast.restore(swapped), name, is_dynamo) == expected


@pytest.mark.parametrize("has_grad", [True, False])
def test_fake_tensors(has_grad: bool) -> None:
    """They have shapes and no memory: what estimates sizes runs models on them."""
    found = []
    for model in pair():
        with FakeTensorMode() as mode, torch.set_grad_enabled(has_grad), any_path():
            state: dict[str, Tensor] = {
                key: mode.from_tensor(x) for key, x in (*model.named_parameters(), *model.named_buffers())
            }
            ids = torch.zeros(3, 5, dtype=torch.long)
            found.append(torch.func.functional_call(model, state, (ids,))[0].shape)
    assert found == [(3, 5, 51)] * 2


@pytest.mark.parametrize("has_grad", [True, False])
def test_forward_mode(has_grad: bool) -> None:
    """A derivative by the inputs' embeddings along a direction."""
    mask = mask_of(MIXED)
    generator = torch.Generator().manual_seed(3)
    embeds, direction = (torch.randn(8, 13, 51, generator=generator) for _ in range(2))
    tangents = []
    for model in pair(attn_implementation="eager"):
        with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(has_grad), any_path():
            dual = torch.autograd.forward_ad.make_dual(embeds, direction)
            output = model(inputs_embeds=dual, attention_mask=mask)[0]
            tangents.append(torch.autograd.forward_ad.unpack_dual(output).tangent)
    assert tangents[1] is not None
    assert_near(tangents[1][mask], tangents[0][mask])


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM"])
def test_tied_decoder(name: str) -> None:
    """It stays the word embeddings' own tensor and trains as such, when swapped, resized, copied and reloaded."""
    models = pair(name)
    losses = []
    for model in models:
        words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
        assert decoder.weight is words.weight
        losses.append(optimize(model, [labelled(name)] * 4))
        assert decoder.weight is words.weight
        model.resize_token_embeddings(101, mean_resizing=False)
        randomise(model, seed=4)
        model.tie_weights()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        losses[-1] += optimize(model, [labelled(name)] * 4)
    assert_losses(losses[1], losses[0])
    assert_same_state(*models)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(models[1])))
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert twin.load_state_dict(models[0].state_dict(), strict=True) == ([], [])
    assert optimize(twin, [labelled(name)] * 2) == pytest.approx(optimize(models[0], [labelled(name)] * 2), rel=1e-5)
    assert set(calls(twin)) == {"fast"}


@pytest.mark.parametrize("is_before", [True, False], ids=["swap on meta", "swap when loaded"])
@pytest.mark.parametrize("assign", [True, False])
@each_classifier
def test_made_on_meta(name: str, assign: bool, is_before: bool) -> None:
    model = build(name)
    with torch.device("meta"):
        late = type(model)(model.config)
    if is_before:
        bert_fast.swap(late)
    late.to_empty(device="cpu")
    late.load_state_dict(model.state_dict(), strict=True, assign=assign)
    for key, buffer in late.named_buffers():  # not of the state
        buffer.copy_(model.get_buffer(key))
    if not is_before:
        bert_fast.swap(late)
    late.eval()
    batch = labelled(name)
    with torch.no_grad():
        assert_near(late(**batch).logits[tokens_of()], model(**batch).logits[tokens_of()])
    assert_same_gradients(gradients(late, late(**batch).loss), gradients(model, model(**batch).loss))
    assert calls(late) == {"fast": 2}


def test_meta_stays_meta() -> None:
    shapes = []
    for model in pair():
        ids = torch.zeros(3, 5, dtype=torch.long, device="meta")
        with any_path():
            output = model.to("meta")(ids)
        assert all(x.is_meta for x in output.values())
        shapes.append([x.shape for x in output.values()])
    assert shapes[1] == shapes[0] == [(3, 5, 51), (3, 51)]


@each_classifier
def test_loaded_as_swapped(name: str, tmp_path: Path) -> None:
    """from_pretrained, which makes models on meta; by the swapped class as well, in 16 bits as well."""
    model, swapped = pair(name)
    swapped.save_pretrained(tmp_path)
    for cls, dtype in itertools.product((type(model), type(swapped)), (torch.float32, torch.bfloat16)):
        loaded = bert_fast.swap(cls.from_pretrained(tmp_path, dtype=dtype)).eval()
        assert {x.dtype for x in loaded.parameters()} == {dtype}
        assert_equal_state(loaded, copy.deepcopy(model).to(dtype))
        if dtype == torch.float32:
            with torch.no_grad():
                found, expected = (x(**batch_for(name)).logits[tokens_of()] for x in (loaded, model))
            assert_near(found, expected)


# ---- threads and shared memory ---------------------------------------------------------------------------------------


@each_classifier
def test_threads_without_gradients(name: str) -> None:
    """Four at once on one model that nobody has called before: bit by bit what one thread gets."""
    model, swapped = pair(name)
    batches = [batch_for(name, rows, seed) for seed in range(3) for rows in (MIXED, WHOLE, OTHER_ROWS)]

    def answer(batch: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = swapped(**batch).logits
            return logits

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, batches * 5))
    assert all(torch.equal(one, answer(batch)) for one, batch in zip(found, batches * 5, strict=True))
    for batch, logits in zip(batches, found, strict=False):
        has_tokens = (batch["attention_mask"] != 0).any(1)
        assert_near(logits[has_tokens], model(**batch).logits[has_tokens].detach())


def test_replicas_in_threads() -> None:
    """As nn.DataParallel does it: shallow copies with tensors that are no parameters, a thread for each."""
    name = "BertForSequenceClassification"
    halves = [{key: x[rows] for key, x in batch_for(name).items()} for rows in (slice(0, 3), slice(3, 5))]
    grads = []
    for model in pair(name):
        state = {key: 1.0 * x for key, x in model.named_parameters()}
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(torch.func.functional_call, copy.deepcopy(model), state, (), half) for half in halves]
        logits = torch.cat([run.result().logits for run in runs])
        grads.append(gradients(model, (logits * torch.arange(15).view(5, 3)).sum()))
    assert_same_gradients(grads[1], grads[0])


def test_shared_memory() -> None:
    """share_memory moves the weights; another process may write to them afterwards."""
    model, swapped = pair("BertForSequenceClassification")
    batch, has_tokens = batch_for("BertForSequenceClassification"), tokens_of()
    with torch.no_grad():
        swapped(**batch)
        swapped.share_memory()
        assert_near(swapped(**batch).logits[has_tokens], model(**batch).logits[has_tokens])
        for each in (model, swapped):
            for parameter in each.parameters():
                parameter.data.mul_(1.01)
        assert_near(swapped(**batch).logits[has_tokens], model(**batch).logits[has_tokens])

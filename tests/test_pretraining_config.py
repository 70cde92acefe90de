"""The configuration of a run: TOML in, presets and defaults under it, every fault named."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import bert_fast

pytest.importorskip("pydantic")

from bert_fast.config import ACTIVATIONS
from bert_fast.pretraining.config import (
    PRESETS,
    ConfigError,
    RunConfig,
    describe,
    differences,
    dump,
    from_dict,
    load,
)
from bert_fast.pretraining.settings import Model

toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

MINIMAL = """
out = "runs/first"
[data]
corpus = "corpus"
[schedule]
steps = 1000
"""


def config(text: str = MINIMAL, *overrides: str) -> RunConfig:
    values: dict[str, Any] = toml.loads(text)
    for override in overrides:
        key, _, value = override.partition("=")
        table = values
        *tables, name = key.split(".")
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = toml.loads(f"x = {value}")["x"]
    return from_dict(values)


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config(MINIMAL, *overrides)
    return str(caught.value)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_minimal_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(MINIMAL, encoding="utf-8")
    found = load(tmp_path / "run.toml")
    assert (found.out, found.data.corpus) == (Path("runs/first"), Path("corpus"))
    assert (found.schedule.steps, found.schedule.minutes) == (1000, None)
    assert (found.data.instances, found.masking.unit, found.masking.rate) == ("nsp", "token", 0.15)
    assert (found.model.preset, found.model.init) == ("base", None)
    assert (found.optimizer.name, found.optimizer.betas, found.optimizer.clip_norm) == ("adamw", (0.9, 0.999), 1.0)
    assert (found.train.precision, found.train.fsdp) == ("fp32", False)
    assert [(phase.length, phase.share, phase.tokens_per_step) for phase in found.phases] == [(512, 1.0, 131072)]
    assert found.bert_config(30522) == bert_fast.BertConfig()


def test_values_are_taken() -> None:
    found = config(
        MINIMAL.replace("steps = 1000", "minutes = 90")
        + """
        kind = "cosine"
        [masking]
        rate = [0.3, 0.15]
        [model]
        preset = "mini"
        init = "start"
        hidden_act = "gelu_new"
        classifier_dropout = 0.2
        [[phases]]
        length = 128
        share = 0.9
        [[phases]]
        length = 384
        share = 0.1
        tokens_per_step = 4096
        [batch]
        tokens_per_step = 8192
        tokens_per_pack = 1024
        """
    )
    assert (found.schedule.steps, found.schedule.minutes, found.schedule.kind) == (None, 90.0, "cosine")
    assert found.masking.rate == (0.3, 0.15)
    assert found.model.init == Path("start")
    assert [(p.length, p.share, p.tokens_per_step) for p in found.phases] == [(128, 0.9, 8192), (384, 0.1, 4096)]
    assert found.bert_config(97, pad_token_id=3) == bert_fast.BertConfig(
        vocab_size=97,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_act="gelu_new",
        classifier_dropout=0.2,
        pad_token_id=3,
    )


def test_nothing_can_be_changed() -> None:
    found: Any = config()
    with pytest.raises(ValueError, match="frozen"):
        found.schedule.steps = 3


@pytest.mark.parametrize(
    ("preset", "layers", "hidden_size", "millions"),
    [
        ("tiny", 2, 128, 4.4),
        ("mini", 4, 256, 11.3),
        ("small", 4, 512, 29.1),
        ("medium", 8, 512, 41.7),
        ("base", 12, 768, 110.1),
        ("large", 24, 1024, 336.2),
        ("cramming", 12, 768, 109.8),  # 384 positions fewer
    ],
)
def test_presets_have_the_published_sizes(preset: str, layers: int, hidden_size: int, millions: float) -> None:
    found = config(MINIMAL, f'model.preset="{preset}"').bert_config(30522)
    assert (found.num_hidden_layers, found.hidden_size) == (layers, hidden_size)
    assert (found.head_size, found.intermediate_size) == (64, 4 * hidden_size)
    with torch.device("meta"):
        model = bert_fast.BertForPreTraining(found)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_cramming() -> None:
    text = 'out = "o"\n[data]\ncorpus = "c"\n[model]\npreset = "cramming"'
    found = config(text)
    assert (found.data.instances, found.masking.rate) == ("full", 0.25)
    assert (found.model.hidden_dropout_prob, found.model.attention_probs_dropout_prob) == (0, 0)
    optimizer = found.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.betas) == ("adamw", 1e-3, (0.9, 0.98))
    assert (optimizer.eps, optimizer.weight_decay, optimizer.clip_norm) == (1e-12, 0.01, 0.5)
    schedule = found.schedule
    assert (schedule.kind, schedule.warmup, schedule.decay, schedule.minutes) == ("trapezoidal", 0.5, 0.5, 1440)
    assert [(p.length, p.tokens_per_step) for p in found.phases] == [(128, 524288)]


def test_the_user_wins_over_the_preset() -> None:
    found = config(
        MINIMAL,
        'model.preset="cramming"',
        "optimizer.learning_rate=0.002",
        "masking.rate=0.4",
        "model.hidden_size=384",
        "model.num_attention_heads=12",
    )
    assert (found.schedule.steps, found.schedule.minutes) == (1000, None)  # not both
    assert (found.optimizer.learning_rate, found.optimizer.clip_norm) == (0.002, 0.5)
    assert found.masking.rate == 0.4
    assert (found.model.hidden_size, found.model.num_attention_heads, found.model.intermediate_size) == (384, 12, 1536)


def test_activations_are_those_of_the_model() -> None:
    assert set(get_args(Model.model_fields["hidden_act"].annotation)) == set(ACTIVATIONS)


def test_presets_stay_as_they_are() -> None:
    before = json.dumps(PRESETS)
    config(MINIMAL, 'model.preset="cramming"', "optimizer.eps=1e-8")
    assert json.dumps(PRESETS) == before


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL, encoding="utf-8")
    found = load(
        file,
        [
            "optimizer.learning_rate=1e-3",
            "optimizer.learning_rate = 2e-3",  # the last one wins
            "model.preset=tiny",  # text without its quotes
            'out="runs/a=b"',
            "optimizer.betas=[0.8, 0.9]",
            "log.tensorboard=false",
            "schedule.minutes=7.5",  # instead of the file's steps
            "phases=[{length = 64, share = 0.5}, {length = 128, share = 0.5}]",
        ],
    )
    assert (found.optimizer.learning_rate, found.optimizer.betas) == (2e-3, (0.8, 0.9))
    assert (found.model.preset, found.model.hidden_size) == ("tiny", 128)
    assert (found.out, found.log.tensorboard) == (Path("runs/a=b"), False)
    assert (found.schedule.steps, found.schedule.minutes) == (None, 7.5)
    assert [phase.length for phase in found.phases] == [64, 128]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", r"the override is 'train\.seed'; it must be section\.key=value"),
        ("=3", r"the override is '=3'"),
        ("train..seed=3", r"the override is 'train\.\.seed=3'"),
        ("train.seed=1O", r'train\.seed is "1O"; it must be an integer in \[0, 2\^63\)'),
        ("train.seed=1\nx = 2", r"train\.seed is "),
        ("train.sed=3", r"train\.sed is unknown; did you mean train\.seed\?"),
        ("out.x=1", r'out is {"x": 1}; it must be a path, as text'),
        ("schedule.steps.x=1", r'schedule\.steps is {"x": 1}; it must be an integer of at least 1'),
    ],
)
def test_overrides_that_are_none(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load(file, [override])


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("out=3", "out is 3; it must be a path, as text"),
        ('data.instances="mlm"', 'data.instances is "mlm"; it must be one of "nsp", "sop", "full"'),
        ("data.short_seq_prob=1.5", "data.short_seq_prob is 1.5; it must be a number in [0, 1]"),
        ("data.duplicates=-1", "data.duplicates is -1; it must be an integer of at least 0"),
        ("masking.rate=0", "masking.rate is 0; it must be a number in (0, 1] or two such, [start, end]"),
        ("masking.rate=[0.3]", "masking.rate is [0.3]; it must be a number in (0, 1] or two such, [start, end]"),
        ("masking.rate=[0.3, 1.1]", "masking.rate is [0.3, 1.1]; it must be a number in (0, 1] or two such"),
        ("masking.max_span=1001", "masking.max_span is 1001; it must be an integer in [1, 1000]"),
        ('model.preset="huge"', 'model.preset is "huge"; it must be one of "tiny", "mini", "small"'),
        ("model.preset=3", "model.preset is 3; it must be one of"),
        ("model.hidden_size=0", "model.hidden_size is 0; it must be an integer of at least 1"),
        ("model.hidden_size=768.0", "model.hidden_size is 768.0; it must be an integer of at least 1"),
        ("model.hidden_size=100", "model.num_attention_heads is missing; it must be an integer of at least 1. Heads."),
        ("model.hidden_dropout_prob=1.0", "model.hidden_dropout_prob is 1.0; it must be a number in [0, 1)"),
        ("model.num_attention_heads=7", "model.num_attention_heads is 7; it must divide model.hidden_size, 768"),
        ("model.layer_norm_eps=0", "model.layer_norm_eps is 0; it must be a number above 0"),
        ('model="tiny"', 'model is "tiny"; it must be a table'),
        ('optimizer.learning_rate="1e-3"', 'optimizer.learning_rate is "1e-3"; it must be a number above 0'),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is NaN; it must be a number above 0"),
        ("optimizer.clip_norm=inf", "optimizer.clip_norm is Infinity; it must be a number of at least 0"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas is [0.9, 1.0]; it must be two numbers in [0, 1)"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; it must be two numbers in [0, 1)"),
        ("schedule.steps=0", "schedule.steps is 0; it must be an integer of at least 1"),
        ("schedule.steps=true", "schedule.steps is true; it must be an integer of at least 1"),
        ("schedule.minutes=3", "schedule.steps and schedule.minutes are both given; exactly one is needed"),
        ("phases=3", "phases is 3; it must be an array of tables"),
        ("phases=[5]", "phases[0] is 5; it must be a table"),
        ("phases=[{}]", "phases[0].length is missing; it must be an integer of at least 5."),
        ("phases=[{length = 4}]", "phases[0].length is 4; it must be an integer of at least 5"),
        ("phases=[{length = 64, share = 0}]", "phases[0].share is 0; it must be a number in (0, 1]"),
        ("phases=[{length = 64, lenght = 3}]", "phases[0].lenght is unknown; did you mean phases[0].length?"),
        ("phases=[{length = 64, share = 0.9}]", "phases.share is 0.9 in all phases together; it must be 1"),
        ("phases=[{length = 513}]", "phases[0].length is 513; it must be at most model.max_position_embeddings, 512"),
        (
            "phases=[{length = 64, tokens_per_step = 16385}]",
            "batch.tokens_per_pack is 16384; it must divide phases[0].tokens_per_step, 16385",
        ),
        ("batch.tokens_per_pack=256", "phases[0].length is 512; it must be at most batch.tokens_per_pack, 256"),
        ("batch.tokens_per_pack=1000", "batch.tokens_per_pack is 1000; it must divide batch.tokens_per_step, 131072"),
        ("batch.tokens_per_step=0", "batch.tokens_per_step is 0; it must be an integer of at least 1"),
        ('train.precision="fp8"', 'train.precision is "fp8"; it must be one of "fp32", "bf16", "fp16"'),
        ("train.fsdp=1", "train.fsdp is 1; it must be true or false"),
        ("train.seed=-1", "train.seed is -1; it must be an integer in [0, 2^63)"),
        ("checkpoint.keep=0", "checkpoint.keep is 0; it must be an integer of at least 1"),
        ("model.type_vocab_size=1", "model.type_vocab_size is 1; it must be at least 2 for the pairs of 'nsp'"),
        ("optimiser.name=3", "optimiser is unknown; did you mean optimizer?"),
        ("optimizer.precision=3", "optimizer.precision is unknown; did you mean train.precision?"),
        ("log.x=3", "log.x is unknown; [log] takes every, tensorboard"),
        ("model.vocab_size=3", "model.vocab_size is unknown; did you mean model.type_vocab_size?"),
        ("zzz=3", "zzz is unknown; the file takes out, data, masking,"),
    ],
)
def test_each_fault(override: str, message: str) -> None:
    found = fault(override)
    assert found.startswith(f"the configuration: {message}")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["masking.mask_probability=0.9", "masking.random_probability=0.2"],
            "masking.mask_probability is 0.9 and masking.random_probability is 0.2; together they must be at most 1",
        ),
        (
            ['schedule.kind="trapezoidal"', "schedule.warmup=0.6", "schedule.decay=0.5"],
            "schedule.warmup is 0.6 and schedule.decay is 0.5; together they must be at most 1",
        ),
    ],
)
def test_faults_of_two_keys(overrides: list[str], message: str) -> None:
    assert fault(*overrides) == f"the configuration: {message}"
    if "kind" in overrides[0]:
        assert config(MINIMAL, *overrides[1:]).schedule.warmup == 0.6  # only the trapezoid reads decay


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(
            {"data": {"corpse": 1}, "model": {"preset": "huge"}, "phases": [{"length": 9, "share": "all"}]}, "a.toml"
        )
    assert str(caught.value).split("\n") == [
        "a.toml:",
        "  out is missing; it must be a path, as text. Output folder.",
        "  data.corpus is missing; it must be a path, as text. Folder of a prepared corpus.",
        "  data.corpse is unknown; did you mean data.corpus?",
        '  model.preset is "huge"; it must be one of "tiny", "mini", "small", "medium", "base", "large", "cramming"',
        "  schedule.steps and schedule.minutes are both missing; exactly one is needed",
        '  phases[0].share is "all"; it must be a number in (0, 1]',
    ]


def test_all_faults_between_sections() -> None:
    found = fault("batch.tokens_per_pack=100", "phases=[{length = 600, share = 0.5}]")
    assert found.count("\n  phases") == 3
    assert found.count("\n  batch") == 1


def test_long_values_are_cut() -> None:
    found = fault(f'model.preset="{"x" * 200}"')
    assert found.startswith(f'the configuration: model.preset is "{"x" * 76}...; it must be one of')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"out = 3\nsteps = = 4\n", r"run\.toml: .*line 2"),
        (b"out = 1\nout = 2\n", r"run\.toml: .*line 2"),
        (b"out = '\xff'", r"run\.toml: 'utf-8' codec can't decode byte 0xff"),
        (b"", r"run\.toml:\n  out is missing"),
    ],
)
def test_files_that_are_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "run.toml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml is no file; a TOML file is needed"):
        load(tmp_path / "run.toml")


# ---- out again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset: str) -> None:
    found = config(MINIMAL, f'model.preset="{preset}"', "masking.rate=[0.3, 0.15]", 'model.init="start"')
    values = json.loads(json.dumps(dump(found)))
    assert from_dict(values) == found
    assert values["out"] == "runs/first"
    assert values["schedule"]["minutes"] is None


def test_differences() -> None:
    one, other = config(), config(MINIMAL, "masking.rate=[0.15, 0.3]", "train.seed=3")
    assert differences(one, config()) == []
    assert differences(one, other) == ["masking.rate", "train.seed"]
    two_phases = config(MINIMAL, "phases=[{length = 512, share = 0.75}, {length = 64, share = 0.25}]")
    longer = ["phases[0].share", "phases[1].length", "phases[1].share", "phases[1].tokens_per_step"]
    assert differences(one, two_phases) == differences(two_phases, one) == longer


def test_description_is_a_run() -> None:
    text = describe()
    assert max(map(len, text.splitlines())) <= 120
    found = config(text)
    assert found == config(MINIMAL, "schedule.steps=100000")
    # with every commented key set, the same again: each key is there, with its default
    full = re.sub(r"(?m)^# (\w+ = (?!\.\.\.)|\[\[)", r"\1", text)
    assert full.count("\n[") == text.count("\n[") + 1
    assert dump(config(full)) == dump(found)
    values = dump(found)
    keys = [key for name, table in values.items() if isinstance(table, dict) for key in table]
    for key in [*keys, *values["phases"][0], "out"]:
        assert re.search(rf"(?m)^(# )?{key} = ", text), key
    assert all(f"#    {preset}: " in text for preset in PRESETS)

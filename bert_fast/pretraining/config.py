"""The configuration of a pretraining run: TOML, checked as a whole, and presets."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from sys import version_info
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ..config import BertConfig
from .schedules import Kind

__all__ = ["PRESETS", "ConfigError", "RunConfig", "describe", "differences", "dump", "from_dict", "load"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message has a line for each fault."""


# ---- what the keys take ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowed:
    """What a key takes, in words that follow "it must be"."""

    text: str


Folder = Annotated[Path, Field(strict=False), Allowed("a path, as text")]
OptionalFolder = Annotated[Path | None, Field(strict=False), Allowed("a path, as text")]
Seed = Annotated[int, Field(ge=0, lt=2**63), Allowed("an integer in [0, 2^63)")]
Count = Annotated[int, Field(ge=0), Allowed("an integer of at least 0")]
Positive = Annotated[int, Field(ge=1), Allowed("an integer of at least 1")]
OptionalPositive = Annotated[int | None, Field(ge=1), Allowed("an integer of at least 1")]
Length = Annotated[int, Field(ge=5), Allowed("an integer of at least 5")]  # [CLS] a [SEP] b [SEP]
Span = Annotated[int, Field(ge=1, le=1000), Allowed("an integer in [1, 1000]")]
NotNegative = Annotated[float, Field(ge=0), Allowed("a number of at least 0")]
Above0 = Annotated[float, Field(gt=0), Allowed("a number above 0")]
OptionalAbove0 = Annotated[float | None, Field(gt=0), Allowed("a number above 0")]
Share = Annotated[float, Field(ge=0, le=1), Allowed("a number in [0, 1]")]
OpenShare = Annotated[float, Field(gt=0, le=1), Allowed("a number in (0, 1]")]
Rate = Annotated[
    OpenShare | Annotated[tuple[OpenShare, OpenShare], Field(strict=False)],
    Allowed("a number in (0, 1] or two such, [start, end]"),
]
Dropout = Annotated[float, Field(ge=0, lt=1), Allowed("a number in [0, 1)")]
OptionalDropout = Annotated[float | None, Field(ge=0, lt=1), Allowed("a number in [0, 1)")]
Betas = Annotated[tuple[Dropout, Dropout], Field(strict=False), Allowed("two numbers in [0, 1)")]


# ---- sections --------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """A table of the TOML file: it takes no other keys, and no value of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(Section):
    """[data]: where the text is and what an instance of it is."""

    corpus: Folder = Field(description="Folder of a prepared corpus.")
    instances: Literal["nsp", "sop", "full"] = Field(
        default="nsp",
        description="Pairs with next-sentence prediction, pairs with sentence-order prediction, or running text alone.",
    )
    short_seq_prob: Share = Field(default=0.1, description="Share of the pairs that are made shorter than the length.")
    duplicates: Count = Field(default=0, description="0: masks are always new; n: n fixed ones, as in BERT's code.")
    lanes: Positive = Field(1, description="Parts of the corpus that take turns; a process plans only those it reads.")
    workers: Count = Field(default=0, description="Processes that make batches; 0: the run's own.")


class Masking(Section):
    """[masking]: which tokens are predicted."""

    unit: Literal["token", "word", "span"] = Field(default="token", description="What is masked as a whole.")
    rate: Rate = Field(default=0.15, description="Share of the tokens that is predicted; a pair: from start to end.")
    mask_probability: Share = Field(default=0.8, description="Share of the predicted tokens that becomes [MASK].")
    random_probability: Share = Field(default=0.1, description="Share of the predicted tokens that becomes any token.")
    max_span: Span = Field(default=3, description="Words in the longest span.")

    @model_validator(mode="after")
    def _check(self) -> Masking:
        mask, random = self.mask_probability, self.random_probability
        if mask + random > 1 + 1e-9:
            raise ValueError(
                f"masking.mask_probability is {mask} and masking.random_probability is {random}; "
                "together they must be at most 1"
            )
        return self


class Model(Section):
    """[model]: the sizes of the model."""

    preset: Literal["tiny", "mini", "small", "medium", "base", "large", "cramming"] = Field(
        default="base", description="Defaults of other keys, listed below."
    )
    init: OptionalFolder = Field(default=None, description="Folder of a checkpoint of these sizes to start from.")
    hidden_size: Positive = Field(description="Width of the hidden states. Default: the preset's.")
    num_hidden_layers: Positive = Field(description="Encoder layers. Default: the preset's.")
    num_attention_heads: Positive = Field(description="Heads. Default: hidden_size / 64, where that is whole.")
    intermediate_size: Positive = Field(description="Width of the feed-forward layers. Default: 4 * hidden_size.")
    hidden_act: Literal["gelu", "gelu_new", "gelu_python", "gelu_pytorch_tanh"] = Field(
        default="gelu", description="Activation: gelu and gelu_python by erf, the others by tanh."
    )
    hidden_dropout_prob: Dropout = Field(default=0.1, description="Dropout after the embeddings and each sublayer.")
    attention_probs_dropout_prob: Dropout = Field(default=0.1, description="Dropout of the attention probabilities.")
    classifier_dropout: OptionalDropout = Field(
        default=None,
        description="Dropout before a later classifier; without it that of hidden states.",
    )
    max_position_embeddings: Length = Field(default=512, description="Tokens of the longest sequence.")
    type_vocab_size: Positive = Field(default=2, description="Segment types.")
    initializer_range: Above0 = Field(default=0.02, description="Standard deviation of the initial weights.")
    layer_norm_eps: Above0 = Field(default=1e-12, description="Added to the variance in LayerNorm.")

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads is {self.num_attention_heads}; "
                f"it must divide model.hidden_size, {self.hidden_size}"
            )
        return self


class Optimizer(Section):
    """[optimizer]: what changes the weights."""

    name: Literal["adamw", "lamb"] = Field(default="adamw", description="AdamW, or LAMB for large batches.")
    learning_rate: Above0 = Field(default=1e-4, description="The highest one; the schedule's factor is 1 there.")
    weight_decay: NotNegative = Field(default=0.01, description="Of matrices; biases and LayerNorms have none.")
    betas: Betas = Field(default=(0.9, 0.999), description="Decay rates of the means of the gradient and its square.")
    eps: Above0 = Field(default=1e-6, description="Added to the root of the mean square.")
    clip_norm: NotNegative = Field(default=1.0, description="Largest norm of the whole gradient; 0: any.")


class Schedule(Section):
    """[schedule]: how long the run lasts, and the learning rate over it."""

    steps: OptionalPositive = Field(default=None, description="Optimizer steps. Either these or minutes are needed.")
    minutes: OptionalAbove0 = Field(default=None, description="Wall-clock time instead of steps.")
    kind: Kind = Field(default="linear", description="Course of the learning rate after the warm-up.")
    warmup: Share = Field(default=0.1, description="Share of the run over which the learning rate rises from 0.")
    decay: Share = Field(default=0.2, description="Share of the run, at its end, over which the trapezoid falls.")
    floor: Share = Field(default=0.0, description="Share of the learning rate that is left at the end.")

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        faults = []
        if (self.steps is None) == (self.minutes is None):
            which = "missing" if self.steps is None else "given"
            faults.append(f"schedule.steps and schedule.minutes are both {which}; exactly one is needed")
        if self.kind == "trapezoidal" and self.warmup + self.decay > 1 + 1e-9:
            faults.append(
                f"schedule.warmup is {self.warmup} and schedule.decay is {self.decay}; together they must be at most 1"
            )
        _refuse(faults)
        return self


class Phase(Section):
    """An entry of [[phases]]: a part of the run with sequences of one length."""

    length: Length = Field(description="Tokens of the longest sequence. Default of one phase: the model's positions.")
    share: OpenShare = Field(default=1.0, description="Share of the run; all shares together are 1.")
    tokens_per_step: Positive = Field(description="Tokens of an optimizer step. Default: batch.tokens_per_step.")


class Batch(Section):
    """[batch]: tokens at a time."""

    tokens_per_step: Positive = Field(default=131072, description="Tokens of an optimizer step, over all devices.")
    tokens_per_pack: Positive = Field(default=16384, description="Tokens of one forward pass on one device.")


class Train(Section):
    """[train]: how the run is computed."""

    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="Of products; weights stay in fp32.")
    seed: Seed = Field(default=0, description="Of the initial weights, the order of the data, masks and dropout.")
    activation_checkpointing: bool = Field(default=False, description="Less memory: layers are computed twice.")
    fsdp: bool = Field(default=False, description="Spreads weights and optimizer over the devices.")


class Log(Section):
    """[log]: what the run says."""

    every: Positive = Field(default=10, description="Steps from line to line.")
    tensorboard: bool = Field(default=True, description="Whether TensorBoard's files are written.")


class Eval(Section):
    """[eval]: the loss on held-out text."""

    every: Count = Field(default=500, description="Steps from one to the next; 0: only at the end.")
    packs: Positive = Field(default=50, description="Packs of held-out text.")


class Checkpoint(Section):
    """[checkpoint]: what a run goes on from."""

    every: Count = Field(default=1000, description="Steps from one to the next; 0: only at the end.")
    keep: Positive = Field(default=2, description="How many of the last ones stay.")


class RunConfig(Section):
    """A whole run. Every key has its value: presets and defaults are in."""

    out: Folder = Field(description="Output folder.")
    data: Data
    masking: Masking = Masking()
    model: Model
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    phases: Annotated[tuple[Phase, ...], Field(strict=False), Allowed("an array of tables")]
    batch: Batch = Batch()
    train: Train = Train()
    log: Log = Log()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        faults = []
        total = sum(phase.share for phase in self.phases)
        if abs(total - 1) > 1e-6:
            faults.append(f"phases.share is {total:.6g} in all phases together; it must be 1")
        pack, positions = self.batch.tokens_per_pack, self.model.max_position_embeddings
        for number, phase in enumerate(self.phases):
            key = f"phases[{number}]"
            for name, most in (("model.max_position_embeddings", positions), ("batch.tokens_per_pack", pack)):
                if phase.length > most:
                    faults.append(f"{key}.length is {phase.length}; it must be at most {name}, {most}")
            if phase.tokens_per_step % pack:
                is_common = phase.tokens_per_step == self.batch.tokens_per_step
                of = f"{'batch' if is_common else key}.tokens_per_step, {phase.tokens_per_step}"
                faults.append(f"batch.tokens_per_pack is {pack}; it must divide {of}")
        if self.data.instances != "full" and self.model.type_vocab_size < 2:
            faults.append(f"model.type_vocab_size is 1; it must be at least 2 for the pairs of {self.data.instances!r}")
        _refuse(list(dict.fromkeys(faults)))
        return self

    def bert_config(self, vocab_size: int, *, pad_token_id: int = 0) -> BertConfig:
        """The model's configuration.

        Args:
            vocab_size, pad_token_id: of the corpus' vocabulary.

        Raises:
            ValueError: a vocab_size below 1, a pad_token_id outside it.
        """
        sizes = self.model.model_dump(exclude={"preset", "init"})
        return BertConfig(vocab_size=vocab_size, pad_token_id=pad_token_id, **sizes)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError("\n".join(faults))


# ---- presets ---------------------------------------------------------------------------------------------------------


def _sizes(layers: int, hidden_size: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": hidden_size}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"model": _sizes(2, 128)},
    "mini": {"model": _sizes(4, 256)},
    "small": {"model": _sizes(4, 512)},
    "medium": {"model": _sizes(8, 512)},
    "base": {"model": _sizes(12, 768)},
    "large": {"model": _sizes(24, 1024)},
    "cramming": {
        "data": {"instances": "full"},
        "masking": {"rate": 0.25},
        "model": {
            **_sizes(12, 768),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 128,
        },
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.98], "eps": 1e-12, "clip_norm": 0.5},
        "schedule": {"kind": "trapezoidal", "warmup": 0.5, "decay": 0.5, "minutes": 1440},
        "batch": {"tokens_per_step": 4096 * 128},
    },
}
"""What each preset sets unless the user does.

The sizes are those of Turc et al. 2019, table 1, and Devlin et al. 2018. "cramming" is the recipe of Geiping and
Goldstein 2023 for one GPU and one day, as far as the classic architecture goes: no dropout, a one-cycle learning rate,
sequences of 128 tokens. It computes in 16 bits there: choose train.precision for the device.
"""


LENGTHS = ("steps", "minutes")


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Both, table by table; high wins, and its steps or minutes replace whichever low has."""
    merged = dict(low)
    for key, value in high.items():
        before = low.get(key)
        if not isinstance(before, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
            continue
        if any(value.get(name) is not None for name in LENGTHS):
            before = {name: old for name, old in before.items() if name not in LENGTHS}
        merged[key] = _merge(before, value)
    return merged


def _completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The user's values on top of the preset's, with the defaults that depend on other keys.

    Where such another key is bad, anything good stands in for it, so that it alone is reported.
    """
    model = values.get("model", {})
    preset = model.get("preset", "base") if isinstance(model, Mapping) else "base"
    merged = _merge(PRESETS.get(preset if isinstance(preset, str) else "", PRESETS["base"]), values)

    def size(section: str, key: str, otherwise: int) -> int:
        value = merged[section].get(key) if isinstance(merged.get(section), Mapping) else None
        return value if type(value) is int and value > 0 else otherwise

    if isinstance(merged["model"], Mapping):
        hidden_size = size("model", "hidden_size", 64)
        derived = {"intermediate_size": 4 * hidden_size}
        if hidden_size % 64 == 0:
            derived["num_attention_heads"] = hidden_size // 64
        merged["model"] = {**derived, **merged["model"]}
    merged = {"data": {}, "schedule": {}, "phases": [], **merged}
    if isinstance(merged["phases"], (list, tuple)):
        whole = {"length": size("model", "max_position_embeddings", 512)}
        tokens = {"tokens_per_step": size("batch", "tokens_per_step", Batch().tokens_per_step)}
        phases = merged["phases"] or [whole]
        merged["phases"] = [{**tokens, **phase} if isinstance(phase, Mapping) else phase for phase in phases]
    return merged


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a TOML file.

    Args:
        path: of the file. Relative paths in it are taken from the working directory.
        overrides: "section.key=value", stronger than the file, the last one strongest. The value is TOML, or else text
            as it stands.

    Raises:
        ConfigError: no such file, wrong TOML (with the line), or faults in it: all are listed.
    """
    values = _parse(Path(path))
    for override in overrides:
        values = _merge(values, _override(override))
    return from_dict(values, source=str(path))


def from_dict(values: Mapping[str, Any], source: str = "the configuration") -> RunConfig:
    """The configuration of a TOML file's values, or of what dump gave.

    Args:
        values: table by table.
        source: what an error calls it.

    Raises:
        ConfigError: faults; all are listed.
    """
    completed = _completed(values)
    try:
        return RunConfig.model_validate(completed)
    except ValidationError as error:
        faults = list(dict.fromkeys(line for fault in error.errors() for line in _explain(fault, completed)))
    raise ConfigError(f"{source}: {faults[0]}" if len(faults) == 1 else "\n  ".join([f"{source}:", *faults]))


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} is no file; a TOML file is needed")
    try:
        return _toml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML or UTF-8
        raise ConfigError(f"{path}: {error}") from None


def _toml(text: str) -> dict[str, Any]:
    values: dict[str, Any] = import_module("tomllib" if version_info >= (3, 11) else "tomli").loads(text)
    return values


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"the override is {text!r}; it must be section.key=value")
    try:
        parsed = _toml(f"value = {value}")
    except ValueError:
        parsed = {}
    table: Any = parsed["value"] if parsed.keys() == {"value"} else value.strip()
    for name in reversed(names):
        table = {name: table}
    return dict(table)


# ---- faults ----------------------------------------------------------------------------------------------------------


def _section(field: FieldInfo) -> type[Section] | None:
    """The section that a key stands for, or each entry of its array."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _allowed(field: FieldInfo) -> str:
    for entry in field.metadata:
        if isinstance(entry, Allowed):
            return entry.text
    if field.annotation is bool:
        return "true or false"
    if _section(field) is not None:
        return "a table"
    return f"one of {', '.join(map(json.dumps, get_args(field.annotation)))}"


def _explain(fault: Any, values: Any) -> list[str]:
    """One fault that pydantic found, with the key as in the TOML file."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"]).split("\n")
    section: type[Section] | None = RunConfig
    key, field = "", None
    is_missing = fault["type"] == "missing" and isinstance(fault["loc"][-1], str)  # else one number of a pair is
    for part in fault["loc"]:
        if isinstance(part, int) and section is Phase:
            key += f"[{part}]"
        elif section is None:  # a place within the value of a key
            break
        else:
            if part not in section.model_fields:
                return [_unknown(key, part, section)]
            key, field = f"{key}.{part}".lstrip("."), section.model_fields[part]
            section = _section(field)
        if not is_missing:
            values = values[part]
    assert field is not None
    if is_missing:
        return [f"{key} is missing; it must be {_allowed(field)}. {field.description}"]
    allowed = "a table" if key.endswith("]") else _allowed(field)
    return [f"{key} is {_shown(values)}; it must be {allowed}"]


def _unknown(table: str, name: str, section: type[Section]) -> str:
    known = list(section.model_fields)
    near = [f"{table}.{found}".lstrip(".") for found in difflib.get_close_matches(name, known, n=1)]
    near = near or [key for key, _ in _keys() if key.rpartition(".")[2] == name]
    key = f"{table}.{name}".lstrip(".")
    if near:
        return f"{key} is unknown; did you mean {' or '.join(near)}?"
    return f"{key} is unknown; {f'[{table}]' if table else 'the file'} takes {', '.join(known)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- saying it -------------------------------------------------------------------------------------------------------


def dump(config: RunConfig) -> dict[str, Any]:
    """All values, ready for JSON; from_dict makes the same configuration of them."""
    return config.model_dump(mode="json")


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """The dotted keys whose values differ, such as "schedule.steps" or "phases[0].length", in the order of the keys."""
    one, other = (dict(_flat(dump(config))) for config in (a, b))
    missing = object()
    return [key for key in {**one, **other} if one.get(key, missing) != other.get(key, missing)]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _flat(entry, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, entry in enumerate(value):
            yield from _flat(entry, f"{key}[{number}]")
    else:
        yield key, value


def _keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every key of every table."""
    for name, field in RunConfig.model_fields.items():
        section = _section(field)
        if section is None:
            yield name, field
        else:
            yield from ((f"{name}.{key}", entry) for key, entry in section.model_fields.items())


NEEDED = {"out": "runs/first", "data": {"corpus": "corpus"}, "schedule": {"steps": 100_000}}


def describe() -> str:
    """A TOML file with every key: what it is, what it takes, its default. Only the keys that a run needs are set."""
    defaults, needed = dict(_flat(dump(from_dict(NEEDED)))), dict(_flat(NEEDED))
    lines, table = [], ""
    for key, field in _keys():
        section, _, name = key.rpartition(".")
        if section != table:
            table = section
            lines += ["", "# [[phases]]" if section == "phases" else f"[{section}]"]
        value = defaults[key.replace("phases.", "phases[0].")]
        lines += _comment(f"{field.description} It must be {_allowed(field)}.")
        assignment = f"{name} = {'...' if value is None else json.dumps(value)}"
        lines += [assignment if key in needed else f"# {assignment}"]
        if key == "model.preset":
            lines += [line for name, values in PRESETS.items() for line in _comment(f"{name}: {_summary(values)}", 4)]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: int = 1) -> list[str]:
    margin = "#" + " " * indent
    return textwrap.wrap(text, 110, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def _summary(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('model.')} = {json.dumps(value)}" for key, value in _flat(values))

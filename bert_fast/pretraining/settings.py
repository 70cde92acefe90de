"""The tables of a run's configuration: their keys, types and defaults, and what must hold between keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..config import BertConfig
from .schedules import Kind


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
    short_seq_prob: Share = Field(default=0.1, description="Share of the documents whose instances are shorter.")
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
        default=None, description="Dropout before a later classifier; without it that of hidden states."
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

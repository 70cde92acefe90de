"""Encoders of transformers that are built as BertModel is, and their heads; a family says what differs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import engine, ops, reference
from ..config import BertConfig
from ..graphs import GraphRunner
from ..guard import Kept
from ..masking import PackedBatch, from_flattened, unpad
from . import pooling
from .calls import (
    HEADS,
    HeadRows,
    argument_refusal,
    config_refusal,
    mode_refusal,
    numbers_refusal,
    read_rows,
    setting,
    source_of,
    wanted_states,
)
from .family import FIRST_ROWS, Call, Family, PackedRead, TokenHead, kept_rows
from .parts import Layer, Refused, activation_in, is_listened_to, leaf, stack_of
from .plan import Embeddings, Plan, RelativeBias, encode, parameters_of, structure_of

_plans: Kept[Plan] = Kept()


def _pooler(model: Any) -> Any:
    return getattr(model, "pooler", None)


def _runner(model: Any, call: Call, parts: Plan) -> GraphRunner | None:
    """What replays the call, if that is wanted and its work is the same for every batch of a bucket."""
    runner: GraphRunner | None = model.__dict__.get("bert_fast_graphs")
    if runner is None or model.training or call.get("input_ids") is None or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() or setting(model, call, "output_hidden_states"):
        return None
    if parts.rotary is not None and call.get("position_ids") is not None:
        return None  # a graph's are whole numbers of 32 bits
    word: Any = parts.embeddings.word
    weight = word.weight
    if ops.choose("layer_norm", weight.device.type, weight.dtype, weight.shape[1]).path != "triton":
        return None
    return None if weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing() else runner


def with_gap(output: Any) -> tuple[Any, ...]:
    """The output as a tuple, with a None for the pooler's where there is none."""
    extra = () if output.hidden_states is None else (output.hidden_states,)
    pooled = (output.pooler_output,) if hasattr(output, "pooler_output") else ()
    return (output.last_hidden_state, *pooled, *extra)


# Methods of the encoder that the fast forward stands in for.
STEPS = ("__call__", "forward", "_create_attention_masks", "get_extended_attention_mask", "get_head_mask")

TOKEN_HEADS: Mapping[str, TokenHead] = {
    "ForMaskedLM": TokenHead(is_of_vocabulary=True),
    "ForQuestionAnswering": TokenHead(("start_logits", "end_logits"), competes=True),
    "ForTokenClassification": TokenHead(),
}


@dataclass(frozen=True, eq=False)
class BertShaped:
    """A family whose modules have BERT's names and do what BERT's do.

    Attributes:
        name: for people.
        module: the Python module that defines the classes.
        prefix: of the classes' names.
        heads: what heads read of the encoder, by the rest of their names; see Family.kept_rows.
        token_heads: those of them that say something of each token; see Family.token_heads.
        layers: the encoder's attribute for the module that holds its layers.
        bert_names: of a layer's parts in the state, where BERT calls them otherwise -> what BERT calls them.
    """

    name: str
    module: str
    prefix: str
    heads: Mapping[str, HeadRows] = field(default_factory=lambda: HEADS)
    token_heads: Mapping[str, TokenHead] = field(default_factory=lambda: TOKEN_HEADS)
    layers: str = "encoder"
    bert_names: Mapping[str, str] = field(default_factory=dict)

    def family(self) -> Family:
        return Family(
            name=self.name,
            module=self.module,
            encoder=f"{self.prefix}Model",
            steps=STEPS,
            plan=self.plan,
            run=self.run,
            stack=self.stack,
            widths=self.widths,
            oracle=self.oracle,
            view=self.view,
            kept_rows={f"{self.prefix}{head}": rows for head, rows in self.heads.items()},
            pack=self.pack,
            token_heads={f"{self.prefix}{head}": kind for head, kind in self.token_heads.items()},
            uses_columns=self.uses_columns,
        )

    # ---- what families differ in ----

    uses_columns: ClassVar[bool] = True
    """Whether calls that say nothing of positions have their tokens at their columns."""

    def positions(self, model: Any, call: Call) -> Tensor | None:  # noqa: ARG002
        """(batch, length), where a call says nothing of positions; None: the columns."""
        return None

    def flat_positions(self, model: Any, columns: Tensor) -> Tensor:  # noqa: ARG002
        """Those of texts in one row, given each token's place in its text."""
        return columns

    def longest(self, model: Any) -> int | None:
        """Columns for which the position table surely lasts; None: nobody knows."""
        table = getattr(model.embeddings, "position_embeddings", None)
        return getattr(table, "num_embeddings", None)

    def checkpointed(self, model: Any) -> Iterable[Any]:
        """What may be told to checkpoint its activations."""
        around = getattr(model, self.layers)
        return (around, *around.layer)

    def relative_bias(self, model: Any) -> RelativeBias | None:  # noqa: ARG002
        """What is added to attention's scores."""
        return None

    def is_current(self, model: Any, plan: Plan) -> bool:  # noqa: ARG002
        """Whether the configuration says what it said when the plan was made; nobody watches its inside."""
        return True

    def widths(self, model: Any) -> Mapping[str, int]:
        """By operator; see Family."""
        config = model.config
        return {
            "attention": config.hidden_size // config.num_attention_heads,
            "layer_norm": config.hidden_size,
            "gelu": config.intermediate_size,
        }

    def refusal(self, model: Any, call: Call) -> str | None:  # noqa: ARG002
        """Why the call takes the original path, beyond what speaks against it in every family."""
        return None

    def output(self, sequence: Tensor, pooled: Tensor | None, hidden_states: tuple[Tensor, ...] | None) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence, pooler_output=pooled, hidden_states=hidden_states
        )

    def as_tuple(self, output: Any) -> tuple[Any, ...]:
        """The output as the installed transformers gives it with return_dict=False; before 5 no pooler left a None."""
        import transformers

        is_old = int(transformers.__version__.partition(".")[0]) < 5
        return with_gap(output) if is_old else tuple(output.to_tuple())

    # ---- the parts of the model ----

    def container(self, parent: nn.Module, name: str, *suffixes: str) -> nn.Module:
        """A module that the fast path steps over, so that it must be transformers' own.

        Args:
            parent: whose module it is.
            name: of the module.
            suffixes: names that its class may have, with or without the prefix.
        """
        module = leaf(parent, name)
        cls = type(module)
        is_known = cls.__name__.removeprefix(self.prefix) in suffixes
        if not is_known or cls.__module__ != self.module:
            raise Refused(module, f"is a {cls.__name__}" + (f" of {cls.__module__}" if is_known else ""))
        if "forward" in module.__dict__:
            raise Refused(module, "has a forward of its own")
        return module

    def layer(self, layers: nn.Module, name: str) -> Layer:
        layer = self.container(layers, name, "Layer")
        attention = self.container(layer, "attention", "Attention")
        attend: Any = self.container(attention, "self", "SelfAttention", "SdpaSelfAttention")
        attended = self.container(attention, "output", "SelfOutput")
        intermediate = self.container(layer, "intermediate", "Intermediate")
        output = self.container(layer, "output", "Output")
        return Layer(
            query=leaf(attend, "query"),
            key=leaf(attend, "key"),
            value=leaf(attend, "value"),
            attention_output=leaf(attended, "dense"),
            attention_norm=leaf(attended, "LayerNorm"),
            intermediate=leaf(intermediate, "dense"),
            output=leaf(output, "dense"),
            output_norm=leaf(output, "LayerNorm"),
            activation=activation_in(intermediate, "intermediate_act_fn"),
            attention_dropout_p=attend.dropout.p if attend.training else 0.0,
            attention_output_dropout=leaf(attended, "dropout"),
            output_dropout=leaf(output, "dropout"),
            head_size=attend.attention_head_size,
        )

    def parts(self, model: Any) -> Plan:
        """
        Raises:
            Refused: a module within is hooked, or not transformers' own where it would be stepped over.
        """
        embeddings = self.container(model, "embeddings", "Embeddings")
        layers = leaf(self.container(model, self.layers, "Encoder", "Transformer"), "layer")
        parts = [self.layer(layers, name) for name in layers._modules]
        has_types = "token_type_embeddings" in embeddings._modules
        return Plan(
            Embeddings(
                word=leaf(embeddings, "word_embeddings"),
                position=leaf(embeddings, "position_embeddings"),
                token_type=leaf(embeddings, "token_type_embeddings") if has_types else None,
                norm=leaf(embeddings, "LayerNorm"),
                dropout=leaf(embeddings, "dropout"),
            ),
            leaf(model, "embeddings_project") if "embeddings_project" in model._modules else None,
            parts,
            stack_of(model, parts),
            self.relative_bias(model),
        )

    def stack(self, model: Any) -> engine.Stack:
        """The layers as the CPU engine sees them."""
        try:
            return self.parts(model).stack
        except Refused as refused:
            return engine.Stack([], refusal=refused.text(model))

    def plan(self, model: Any, call: Call) -> Plan | str:
        """The model's parts, or why the call takes the original path."""
        reason = (
            mode_refusal(model, self.checkpointed(model))
            or argument_refusal(model, call)
            or numbers_refusal(model, call)
            or config_refusal(model)
            or self.refusal(model, call)
        )
        if reason is not None:
            return reason
        try:
            if torch.compiler.is_compiling():
                return self.parts(model)
            plan = _plans.get(model, functools.partial(self.parts, model))
            if not self.is_current(model, plan):
                _plans.forget(model)
                plan = _plans.get(model, functools.partial(self.parts, model))
            return plan
        except Refused as refused:
            return refused.text(model)

    # ---- the fast forward ----

    def pack(
        self, model: Any, call: Call, device: torch.device | str | None = None
    ) -> tuple[PackedBatch, Tensor | None]:
        """The call's batch without padding, and its inputs_embeds (tokens, hidden_size), if those were given.

        Args:
            model: the encoder.
            call: its arguments.
            device: of the batch; None: that of the inputs.
        """
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        source: Any = embeds if ids is None else ids
        shape = tuple(source.shape[:2])
        if source.dim() != (2 if embeds is None else 3):
            raise ValueError(
                f"input_ids or inputs_embeds has shape {tuple(source.shape)}; (batch, length) or (batch, length, "
                "hidden_size) is needed"
            )
        if shape[1] == 0:
            raise ValueError(f"input_ids or inputs_embeds has shape {tuple(source.shape)}; a length above 0 is needed")
        if call.get("cu_seq_lens_q") is not None:
            return self._pack_flattened(model, call, source, device)
        positions = call.get("position_ids")
        if positions is None:
            positions = self.positions(model, call)
            self._check_length(model, shape[1], positions)
        mask = call.get("attention_mask")
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool)
        elif tuple(mask.shape) != shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)} and the batch {shape}")
        has_types = hasattr(model.embeddings, "token_type_embeddings")
        types = call.get("token_type_ids") if has_types else None
        read = read_rows(model, call)
        keep = None if read is None or tuple(read.shape) != shape else read
        batch = unpad(
            mask,
            ids=ids,
            token_types=None if types is None else types.expand(shape),
            keep=keep,
            keep_first=kept_rows.get() is FIRST_ROWS or _pooler(model) is not None,
            device=source.device if device is None else device,
        )
        if positions is not None:
            batch = replace(batch, positions=batch.select(positions.expand(shape)).to(batch.positions.device))
        return batch, None if embeds is None else batch.select(embeds)

    def _pack_flattened(
        self, model: Any, call: Call, source: Any, device: torch.device | str | None
    ) -> tuple[PackedBatch, Tensor | None]:
        """The same for texts that stand side by side in one row."""
        bounds = call["cu_seq_lens_q"]
        shape = tuple(source.shape[:2])
        if bounds.dim() != 1 or shape[0] != 1 or len(bounds) == 0 or int(bounds[-1]) != shape[1]:
            raise ValueError(
                f"cu_seq_lens_q has shape {tuple(bounds.shape)} and ends with {bounds.flatten()[-1:].tolist()}; the "
                f"batch is {shape[0]} rows of {shape[1]}, and one row, up to whose end the texts go, is needed"
            )

        def row(name: str) -> Tensor | None:
            value = call.get(name)
            return None if value is None else value.expand(shape)[0]

        has_types = hasattr(model.embeddings, "token_type_embeddings")
        types = row("token_type_ids") if has_types else None
        place = source.device if device is None else device
        batch = from_flattened(
            bounds, ids=row("input_ids"), token_types=types, positions=row("position_ids"), device=place
        )
        if call.get("position_ids") is None:
            longest = self.longest(model)
            if longest is not None and batch.max_seqlen > longest:
                raise ValueError(f"a text has length {batch.max_seqlen}; the position table lasts for {longest}")
            batch = replace(batch, positions=self.flat_positions(model, batch.positions))
        embeds = call.get("inputs_embeds")
        return batch, None if embeds is None else embeds[0]

    def _check_length(self, model: Any, length: int, positions: Tensor | None) -> None:
        longest = self.longest(model)
        if longest is None or length <= longest:
            return
        table = model.embeddings.position_embeddings.num_embeddings
        if positions is None or (positions.numel() > 0 and int(positions.max()) >= table):
            raise ValueError(f"the batch has length {length}; max_position_embeddings is {table}")

    def run(self, model: Any, call: Call, parts: Plan) -> Any:
        """The encoder's forward, without padding between the embeddings and the last layer."""
        read = kept_rows.get()
        if isinstance(read, PackedRead) and read.encoder is model:
            return self._run_packed(model, call, parts, read)
        wanted = wanted_states(model, call, len(parts.layers) + 1)
        output = None
        is_flattened = call.get("cu_seq_lens_q") is not None
        if read is FIRST_ROWS and wanted is None and (is_flattened or not self._is_watched(model)):
            output = self._run_for_first_rows(model, call, parts)
        if output is None:
            output = self._run(model, call, parts, wanted)
        return self.as_tuple(output) if setting(model, call, "return_dict") is False else output

    def _run_packed(self, model: Any, call: Call, parts: Plan, read: PackedRead) -> Any:
        """The output with the rows that a head reads, in one row."""
        if read.hidden is None:
            read.hidden = encode(model, parts, read.batch, read.embeds, None, call.get("position_ids") is not None)
        pooler = _pooler(model)
        pooled = None if pooler is None else pooler(read.hidden.index_select(0, read.batch.first_rows)[:, None])
        rows = read.hidden if read.rows is None else read.hidden.index_select(0, read.rows)
        output = self.output(rows[:, None] if read.is_of_texts else rows[None], pooled, None)
        return self.as_tuple(output) if setting(model, call, "return_dict") is False else output

    def _run(self, model: Any, call: Call, parts: Plan, wanted: list[bool] | None) -> Any:
        kept: list[Tensor] = []
        runner = _runner(model, call, parts)
        if runner is not None:
            batch, hidden = self._replayed(model, call, parts, runner)
        else:
            batch, embeds = self.pack(model, call)
            has_positions = call.get("position_ids") is not None
            hidden = encode(model, parts, batch, embeds, None if wanted is None else kept, has_positions)
        sequence = batch.pad(hidden)
        # A graph's next replay writes to its rows.
        if "bert_fast_pooled" in model.__dict__ and runner is None and not is_listened_to(model):
            pooling.remember(sequence, hidden, batch, call.get("attention_mask"))
        # Texts in one row have a first token each.
        firsts = (
            hidden.index_select(0, batch.first_rows)[:, None] if call.get("cu_seq_lens_q") is not None else sequence
        )
        pooler = _pooler(model)
        hidden_states: Any = None
        if wanted is not None:
            *others, last = wanted
            states = [batch.pad(x) if is_wanted else None for x, is_wanted in zip(kept[:-1], others, strict=True)]
            hidden_states = (*states, sequence if last else None)
        pooled = None if pooler is None else pooler(firsts)
        return self.output(firsts if kept_rows.get() is FIRST_ROWS else sequence, pooled, hidden_states)

    def _replayed(self, model: Any, call: Call, parts: Plan, runner: GraphRunner) -> tuple[PackedBatch, Tensor]:
        """The batch and its (tokens, hidden_size); the batch goes through the host, since the mask does anyway."""
        batch, _ = self.pack(model, call, "cpu")
        device = call["input_ids"].device
        if not 0 < batch.total_tokens <= runner.max_tokens:
            batch = batch.to(device)
            return batch, encode(model, parts, batch)
        hidden = runner.run(
            functools.partial(encode, model, parts, has_positions=True),
            batch,
            device,
            parameters_of(parts),
            structure_of(parts),
        )
        if batch.indices is None:
            return batch, hidden.clone()  # the next replay writes there
        return replace(batch, indices=batch.indices.to(device, non_blocking=True)), hidden

    def _is_watched(self, model: Any) -> bool:
        """Whether anybody but the model's head may see what the encoder returns, or a strange pooler reads it."""
        if torch.compiler.is_compiling() or "forward" in model.__dict__ or is_listened_to(model):
            return True
        pooler = _pooler(model)
        if pooler is None:
            return False
        cls = type(pooler)
        return cls.__name__ != f"{self.prefix}Pooler" or cls.__module__ != self.module or is_listened_to(pooler)

    def _run_for_first_rows(self, model: Any, call: Call, parts: Plan) -> Any:
        """The output, whose last hidden state (batch, 1, hidden_size) was computed for the first rows alone; None: the
        call is replayed from a graph."""
        if _runner(model, call, parts) is not None:
            return None
        batch, embeds = self.pack(model, call)
        has_positions = call.get("position_ids") is not None
        first = encode(model, parts, batch, embeds, None, has_positions, batch.first_rows)[:, None]
        pooler = _pooler(model)
        return self.output(first, None if pooler is None else pooler(first), None)

    # ---- the truth ----

    def view(self, model: Any, call: Call, output: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        mask = call.get("attention_mask")
        return output[0], None if mask is None or mask.dim() != 2 else mask.cpu() != 0

    def oracle(self, model: Any, call: Call) -> Tensor:
        """The last hidden state (batch, length, hidden_size) in float64 on the CPU, by bert_fast.reference."""
        weights = {
            name: value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
            for name, value in model.state_dict().items()
        }
        weights = {self._bert_name(name): value for name, value in weights.items()}
        config = BertConfig.from_dict({**self.sizes(model), "is_decoder": False, "pad_token_id": 0})
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        inputs = {name: call[name].detach().cpu() for name in names if call.get(name) is not None}
        if "position_ids" not in inputs and (positions := self.positions(model, call)) is not None:
            inputs["position_ids"] = positions.cpu()
        if "inputs_embeds" in inputs:
            inputs["inputs_embeds"] = inputs["inputs_embeds"].double()
        score_bias = self.score_bias(model, source_of(call).shape[1])
        return reference.bert(weights, config, **inputs, score_bias=score_bias).hidden_states[-1]

    def _bert_name(self, name: str) -> str:
        """What BERT calls a tensor of this family's state."""
        layer, _, rest = name.removeprefix(f"{self.layers}.layer.").partition(".")
        part, _, kind = rest.rpartition(".")
        return f"encoder.layer.{layer}.{self.bert_names[part]}.{kind}" if part in self.bert_names else name

    def sizes(self, model: Any) -> dict[str, Any]:
        """The configuration in BERT's words."""
        return {**model.config.to_dict(), "model_type": "bert"}

    def score_bias(self, model: Any, length: int) -> Tensor | None:  # noqa: ARG002
        """(heads, length, length) in float64, what the model adds to attention's scores."""
        return None

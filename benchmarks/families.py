"""python -m benchmarks.families: a model of each family that swap knows, on ragged batches, against its own library.

Inference, and a classifier's training step: six layers 384 wide, random weights, both models in one process.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import bert_fast
from bert_fast import _C
from bert_fast.cli import models

from .calls import Batch
from .cpu.__main__ import positive
from .cpu.contenders import Field, timed
from .cpu.convert import TINY
from .cpu.measure import MAX_ROUNDS, MIN_ROUNDS, Bench, judge, pooled, verify, workload_facts
from .cpu.peers import SDPA, Place, Torch
from .cpu.report import OURS, Entry, Record, show_facts
from .cpu.rows import Row, measure_steps
from .cpu.run import outcome, run_row, without_paths
from .facts import heading, write_json
from .table import duration
from .workloads import ragged_lengths, token_batches

OUT = Path("benchmarks/results/cpu-families.json")
PACKAGES = ("bert-fast", "torch", "transformers", "numpy")
INFERENCE, TRAINING = "inference", "training step"
TORCH = "torch.nn"

# all-MiniLM-L6-v2's; embeddings are as large as the family's well-known models have them.
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


class Texts(NamedTuple):
    """
    Attributes:
        size: of a batch.
        dry: the lengths of a dry run.
    """

    lengths: Tensor
    size: int
    dry: tuple[int, ...]

    def batches(self, model: Any, is_dry: bool) -> list[Batch]:
        """As they come, padded on the right with the model's own id."""
        lengths = torch.tensor(self.dry) if is_dry else self.lengths
        return token_batches(lengths, self.size, model.config.vocab_size, model.config.pad_token_id)


RAGGED = Texts(ragged_lengths(64), 32, (9, 3))
LONG = Texts(ragged_lengths(32, 16, 1024, mu=5.5), 8, (19, 5))


# ---- the models ------------------------------------------------------------------------------------------------------


def of_transformers(is_dry: bool, kind: str, attention: str = "sdpa", **more: Any) -> Any:
    import transformers

    sizes = {**SIZES, **more, **(TINY if is_dry else {})}
    # Wider than at the start of a training, where attention is nearly even and its gradients nearly nothing.
    sizes["initializer_range"] = sizes["hidden_size"] ** -0.5
    if kind == "distilbert":
        sizes["hidden_dim"] = sizes["intermediate_size"]
    if kind == "modernbert" and is_dry:
        sizes |= {"num_hidden_layers": 2, "local_attention": 6}  # a layer with a window that ends within a text
    with models.quiet():
        config = transformers.AutoConfig.for_model(kind, **sizes)
        classifier: Any = transformers.AutoModelForSequenceClassification
        return classifier.from_config(config, attn_implementation=attention)


class TorchConfig(NamedTuple):
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    pad_token_id: int = 0


class Output(NamedTuple):
    hidden: Tensor
    loss: Tensor | None


class TorchClassifier(nn.Module):
    """torch.nn.TransformerEncoder between embeddings and two classes of a text's mean; called as transformers' are."""

    def __init__(self, config: TorchConfig, norm_first: bool) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        layer = nn.TransformerEncoderLayer(
            width,
            config.num_attention_heads,
            config.intermediate_size,
            activation="gelu",
            batch_first=True,
            norm_first=norm_first,
        )
        self.embeddings = nn.Embedding(config.vocab_size, width)
        self.encoder = nn.TransformerEncoder(
            layer,
            config.num_hidden_layers,
            nn.LayerNorm(width) if norm_first else None,
            enable_nested_tensor=not norm_first,  # torch has none where norms come first
        )
        for parameter in self.encoder.parameters():  # the layers are copies of one
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.classifier = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        hidden = self.encoder(self.embeddings(input_ids), src_key_padding_mask=attention_mask == 0)
        if labels is None:
            return Output(hidden, None)
        means = pooled(hidden, {"attention_mask": attention_mask})
        return Output(hidden, F.cross_entropy(self.classifier(means), labels))


def of_torch(is_dry: bool, norm_first: bool) -> Any:
    return TorchClassifier(TorchConfig(30522, **(TINY if is_dry else SIZES)), norm_first)


class Kind(NamedTuple):
    """
    Attributes:
        name: the family's.
        make: makes a classifier, tiny in a dry run.
        peer: what it runs through unswapped.
    """

    name: str
    make: Callable[[bool], Any]
    peer: str = SDPA


POSITIONS: dict[str, Any] = {"max_position_embeddings": 514}  # two more than tokens: padding has one
KINDS = (
    Kind("BERT", partial(of_transformers, kind="bert")),
    Kind("RoBERTa", partial(of_transformers, kind="roberta", vocab_size=50265, **POSITIONS)),
    Kind("XLM-RoBERTa", partial(of_transformers, kind="xlm-roberta", vocab_size=250002, **POSITIONS)),
    Kind("CamemBERT", partial(of_transformers, kind="camembert", vocab_size=32005, **POSITIONS)),
    Kind("DistilBERT", partial(of_transformers, kind="distilbert")),
    Kind("ELECTRA", partial(of_transformers, kind="electra", embedding_size=128)),
    Kind(  # transformers has no SDPA for MPNet
        "MPNet",
        partial(of_transformers, kind="mpnet", attention="eager", vocab_size=30527, **POSITIONS),
        "transformers eager",
    ),
    Kind(
        "ModernBERT",
        partial(of_transformers, kind="modernbert", num_attention_heads=6, intermediate_size=576, local_attention=128),
    ),
    Kind("torch.nn.TransformerEncoder (post-norm)", partial(of_torch, norm_first=False), TORCH),
    Kind("torch.nn.TransformerEncoder (pre-norm)", partial(of_torch, norm_first=True), TORCH),
)


def contenders(kind: Kind, is_dry: bool) -> dict[str, Any]:
    """The swapped model and then the original, with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    original = kind.make(is_dry).eval()
    return {OURS: bert_fast.swap(copy.deepcopy(original)), kind.peer: original}


# ---- the rows --------------------------------------------------------------------------------------------------------


def describe(record: Record, model: Any, batches: Sequence[Batch]) -> None:
    config = model.config
    record.facts = {**workload_facts(batches), **{name: getattr(config, name) for name in ("vocab_size", *SIZES)}}


@contextmanager
def torch_fast_calls() -> Iterator[list[bool]]:
    """Within it each layer that torch.nn computes on its own fast path: whether the batch was without padding there."""
    function, seen = torch._transformer_encoder_layer_fwd, []

    def noting(source: Tensor, *args: Any) -> Tensor:
        seen.append(source.is_nested)
        return function(source, *args)

    with mock.patch.object(torch, "_transformer_encoder_layer_fwd", noting), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage", UserWarning)
        yield seen


def note_paths(record: Record, swapped: nn.Module) -> None:
    """Whether ours took the fast path at every call."""
    paths: Counter[str] = Counter()
    for encoder in bert_fast.report(swapped).encoders:
        paths.update(encoder.calls)
    record.facts["bert_fast_calls"] = dict(paths)
    if set(paths) != {"fast"} and record.problem is None:
        record.problem = f"{OURS} took other paths than the fast one: {dict(paths)}"


@torch.inference_mode()
def inference(bench: Bench, record: Record, kind: Kind, texts: Texts, min_rounds: int) -> None:
    """The encoder's hidden states at all tokens."""
    found = contenders(kind, bench.is_dry)
    batches = texts.batches(found[OURS], bench.is_dry)
    describe(record, found[OURS], batches)
    record.entries = [Entry(name) for name in found]
    engines = {name: Torch(getattr(model, "base_model", model)) for name, model in found.items()}
    states = {}
    for entry in record.entries:
        with torch_fast_calls() as layers:
            start = time.perf_counter()
            states[entry.name] = engines[entry.name].states(batches)
            entry.first_seconds = time.perf_counter() - start
        if entry.name == TORCH:
            record.facts["torch_fast_path"] = {"layers": len(layers), "nested": any(layers)}
            if len(layers) != len(batches) * found[OURS].config.num_hidden_layers:
                record.problem = f"{TORCH} did not take its own fast path"
    verify(record.entries[0], states[OURS], states[kind.peer], batches)
    judge(record)
    if record.problem is None:
        turns = {name: timed(engine.work(batches)) for name, engine in engines.items()}
        times, record.rounds = bench.time(turns, min_rounds)
        record.set_times(times)
    note_paths(record, found[OURS])


def training(bench: Bench, record: Record, kind: Kind, texts: Texts, min_rounds: int) -> None:
    """Of the first batch."""
    found = contenders(kind, bench.is_dry)
    batch = texts.batches(found[OURS], bench.is_dry)[0]
    describe(record, found[OURS], [batch])
    record.facts["dropout"] = max(
        (module.p for module in found[OURS].modules() if isinstance(module, nn.Dropout)), default=0.0
    )
    measure_steps(bench, record, found, batch, min_rounds)
    note_paths(record, found[OURS])


def rows(min_rounds: int = MIN_ROUNDS) -> list[Row]:
    workloads = [(kind.name, kind, RAGGED) for kind in KINDS]
    workloads += [(f"{kind.name}, long texts", kind, LONG) for kind in KINDS if kind.name == "ModernBERT"]
    return [
        Row(name, what, partial(run, kind=kind, texts=texts, min_rounds=min_rounds))
        for name, kind, texts in workloads
        for what, run in ((INFERENCE, inference), (TRAINING, training))
    ]


def chosen(only: Sequence[str], min_rounds: int = MIN_ROUNDS) -> list[Row]:
    """The rows of these families, or whose names contain one of the words; without words all."""
    families = {kind.name.lower() for kind in KINDS}

    def fits(row: Row, word: str) -> bool:
        return row.model.partition(",")[0].lower() == word if word in families else word in row.name.lower()

    return [row for row in rows(min_rounds) if not only or any(fits(row, word.lower()) for word in only)]


# ---- the run ---------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console) -> None:
    """Prints a file's content as a table in Markdown."""
    (run,) = result["runs"]
    table = Table(box=box.MARKDOWN)
    for name in ("", "peer", *(f"{what}: {part}" for what in (INFERENCE, TRAINING) for part in ("ours", "peer", "x"))):
        table.add_column(name, justify="right" if ":" in name else "left", no_wrap=True)
    for model in dict.fromkeys(row["model"] for row in run["rows"]):
        found = {row["name"].rpartition(": ")[2]: row for row in run["rows"] if row["model"] == model}
        peers = [entry["name"] for row in found.values() for entry in row["entries"][1:]]
        cells = [cell for what in (INFERENCE, TRAINING) for cell in _cells(found.get(what))]
        table.add_row(escape(model), *peers[:1] or ["-"], *cells)
    console.print(f"threads: {run['threads']}; medians, interleaved (quartiles); x = the peer's over ours\n")
    console.print(table)
    console.print()
    show_facts(result, console)


def _cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or not row["rounds"]:
        return ["-"] * 3
    first, second = row["entries"]
    return [_time(first), _time(second), f"{second['ratio']:.2f}x"]


def _time(entry: Mapping[str, Any]) -> str:
    low, middle, high = (duration(seconds) for seconds in entry["quartiles"])
    return f"{middle} ({low.partition(' ')[0]}-{high.partition(' ')[0]})"


def run(out: Path | None, todo: Sequence[Row], threads: int, is_dry: bool) -> bool:
    """Measures the rows, writes `out` after each and prints the table; whether nothing is wrong."""
    started, console = time.time(), Console(width=190)
    found: dict[str, Any] = {"threads": threads, "instruction_set": _C.instruction_set(), "engines": {}, "rows": []}
    found |= {"not_run": [row.name for row in todo], "problem": None}
    result = heading(PACKAGES, is_dry)
    result["device"]["instruction_set"] = found["instruction_set"]
    result["runs"].append(found)
    bench = Bench(Field(Place(Path(), "families", threads, is_dry)), math.inf)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for row in todo:
            record = run_row(bench, row)
            console.print(f"{row.name}: {outcome(record)}", markup=False, highlight=False)
            found["rows"].append(record.to_dict())
            found["not_run"].remove(row.name)
            result["minutes"] = (time.time() - started) / 60
            if out is not None:
                write_json(out, without_paths(result))
    finally:
        torch.set_num_threads(before)
    show(result, console)
    return not any(row["problem"] for row in found["rows"])


def rounds(text: str) -> int:
    if positive(text) > MAX_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is above {MAX_ROUNDS}, the rounds of which no row has more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.families",
        description="Measures a model of each family on this CPU, swapped and not. "
        "Exit status 1: a result of ours is wrong, a fast path was not taken, or a row broke.",
    )
    add = made.add_argument
    add("--out", type=Path, metavar="FILE", help=f"receives the results, as JSON; default: {OUT}, nothing if --dry")
    add("--threads", default=torch.get_num_threads(), type=positive, metavar="N", help="default: %(default)s")
    add("--only", nargs="+", action="extend", default=[], metavar="NAME", help="families, or parts of rows' names")
    add("--rounds", default=MIN_ROUNDS, type=rounds, metavar="N", help="at least; default: %(default)s")
    add("--dry", action="store_true", help="every row, tiny, one round")
    return made


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    todo = chosen(options.only, options.rounds)
    if not todo:
        parser().error(f"--only: no row's name contains {' or '.join(options.only)}")
    out = OUT if options.out is None and not options.dry else options.out
    return 0 if run(out, todo, options.threads, options.dry) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Whole encoders, random weights, against transformers; and how many binaries their batches need."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bert_fast
from bert_fast import checkpoint, kernels
from bert_fast.masking import PackedBatch

from ..workloads import right_padded
from .measure import ERROR_BOUNDS, Bench, Calls, Contender, compiled, peak_memory, relative_error
from .report import Record

Batch = dict[str, Tensor]

BASE: dict[str, Any] = {}  # transformers' own default
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TINY_LENGTHS = [3, 17]


def theirs(bench: Bench, name: str, sizes: dict[str, Any], **options: Any) -> Any:
    """transformers' class of this name with random weights, SDPA, in evaluation mode."""
    import transformers

    config = transformers.BertConfig(**bench.size(sizes, TINY))
    with bench.device:
        model = getattr(transformers, name)(config, **options)
    model.set_attn_implementation("sdpa")
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases that are zero hide mistakes
            parameter.data.add_(torch.randn_like(parameter) * (0.05 if "LayerNorm" in parameter_name else 0.02))
    return model.to(bench.dtype).eval()


def ours(model: Any) -> Any:
    """Our class of the same name, with the same weights."""
    cls = getattr(bert_fast, type(model).__name__)
    config = bert_fast.BertConfig.from_dict(model.config.to_dict())
    parameter = next(model.parameters())
    with parameter.device:
        twin = cls(config, has_pooler=model.pooler is not None) if cls is bert_fast.BertModel else cls(config)
    twin.to(parameter.dtype)
    checkpoint.apply(twin, model.state_dict())
    return twin.eval()


def batches(bench: Bench, lengths: Tensor, count: int = 1) -> list[Batch]:
    """Batches with these lengths and their own ids, on the device."""
    if bench.is_dry:
        lengths = torch.tensor(TINY_LENGTHS[: len(lengths)])
    mask = right_padded(lengths)
    high = bench.size(30522, TINY["vocab_size"])
    made: list[Batch] = [
        {"input_ids": torch.randint(5, high, mask.shape) * mask, "attention_mask": mask} for _ in range(count)
    ]
    return [{name: x.to(bench.device) for name, x in batch.items()} for batch in made]


def flops(model: Any, lengths: Tensor) -> float:
    """Of a forward pass on the tokens alone, head not counted."""
    config = model.config
    hidden = config.hidden_size
    linear = 2.0 * float(lengths.sum()) * (4 * hidden * hidden + 2 * hidden * config.intermediate_size)
    attention = 4.0 * float((lengths.double() ** 2).sum()) * hidden
    return float(config.num_hidden_layers * (linear + attention))


def lengths_of(batch: Batch) -> Tensor:
    return batch["attention_mask"].sum(1).cpu()


def at_tokens(batch: Batch, x: Tensor) -> Tensor:
    return x[batch["attention_mask"].bool()]


def _calls(model: Callable[..., Any], inputs: list[Batch]) -> Calls:
    return [partial(model, **batch) for batch in inputs]


def _verify(bench: Bench, record: Record, model: Any, fast: Callable[[Batch], list[Tensor]], batch: Batch) -> None:
    """Our results at tokens against transformers' in float32; at most twice the error that its own have."""

    def results(of: Any) -> list[Tensor]:
        values = of(**batch)
        return [at_tokens(batch, x) for x in values.to_tuple() if x.dim() >= 2 and x.shape[:2] == batch_shape]

    batch_shape = batch["input_ids"].shape
    exact = results(copy.deepcopy(model).float())
    their_error = relative_error(results(model), exact)
    bench.verify(record, fast(batch), exact, max(2 * their_error, ERROR_BOUNDS[bench.dtype]))
    record.facts["theirs' error"] = their_error


def _swapped_results(model: Any) -> Callable[[Batch], list[Tensor]]:
    def run(batch: Batch) -> list[Tensor]:
        values = model(**batch)
        shape = batch["input_ids"].shape
        return [at_tokens(batch, x) for x in values.to_tuple() if x.dim() >= 2 and x.shape[:2] == shape]

    return run


def _reduce_overhead(bench: Bench, model: Any, inputs: list[Batch]) -> Calls:
    return _calls(compiled(bench, model, mode="reduce-overhead"), inputs)


# ---- inference -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def base_inference(bench: Bench, record: Record) -> None:
    """Batch 32, lengths uniform with mean 0.6 x 512."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(102, 513, (32,), generator=generator)
    lengths[0] = 512
    model = theirs(bench, "BertModel", BASE, add_pooling_layer=False)
    swapped = bert_fast.swap(copy.deepcopy(model))
    inputs = batches(bench, lengths, bench.size(3, 1))
    _verify(bench, record, model, _swapped_results(swapped), inputs[0])
    tokens = float(lengths_of(inputs[0]).sum())
    record.floor = bench.floor(moved=0, flops=flops(model, lengths_of(inputs[0])))
    peers = [
        Contender("transformers SDPA", _calls(model, inputs)),
        Contender("torch.compile", make=lambda: _calls(compiled(bench, model), inputs)),
    ]
    bench.time(record, Contender("ours", _calls(swapped, inputs)), peers, hides_host=False)
    record.expect_faster("transformers SDPA", 2.0)
    record.expect_faster("torch.compile", 1.3)
    record.facts["tokens/s"] = tokens / (record.seconds or float("nan"))


@torch.no_grad()
def variable_lengths(bench: Bench, record: Record) -> None:
    """Lengths N(256, 64) within [16, 512], as in ModernBERT's table, beside as many tokens in rows of 512."""
    generator = torch.Generator().manual_seed(0)
    lengths = (256 + 64 * torch.randn(64, generator=generator)).clamp(16, 512).long()
    model = theirs(bench, "BertModel", BASE, add_pooling_layer=False)
    swapped = bert_fast.swap(copy.deepcopy(model))
    variable = batches(bench, lengths)
    fixed = batches(bench, torch.full((32,), 512))
    if bench.is_dry:
        fixed = [{name: torch.ones_like(x) for name, x in variable[0].items()}]
    _verify(bench, record, model, _swapped_results(swapped), variable[0])
    record.floor = bench.floor(moved=0, flops=flops(model, lengths_of(variable[0])))
    peers = [
        Contender("bert_fast, rows of 512", _calls(swapped, fixed)),
        Contender("transformers SDPA", _calls(model, variable)),
        Contender("transformers SDPA, rows of 512", _calls(model, fixed)),
    ]
    bench.time(record, Contender("ours", _calls(swapped, variable)), peers, hides_host=False)
    useful, whole = (float(lengths_of(batch).sum()) for batch in (variable[0], fixed[0]))
    record.facts |= {"tokens": useful, "tokens in rows of 512": whole}
    peer = record.peer("bert_fast, rows of 512")
    ratio = None if peer is None or peer.ratio is None else peer.ratio * useful / whole
    record.expect("throughput over that of rows of 512", 0.95, ratio)


@torch.no_grad()
def latency(bench: Bench, record: Record) -> None:
    """Batch 1, length 128; all get the same mask, on the device."""
    model = theirs(bench, "BertModel", BASE, add_pooling_layer=False)
    swapped = bert_fast.swap(copy.deepcopy(model))
    graphed = bert_fast.swap(copy.deepcopy(model), cuda_graphs=bench.is_cuda)
    inputs = batches(bench, torch.tensor([128]))
    on_host = [{**batch, "attention_mask": batch["attention_mask"].cpu()} for batch in inputs]

    def captured() -> Calls:
        bench.need_cuda()
        own, ids = ours(model), inputs[0]["input_ids"]
        return [_graph(own, own.pack(ids.clone(), None, None, None), ids)]

    _swapped_results(graphed)(inputs[0])  # captures
    _verify(bench, record, model, _swapped_results(graphed), inputs[0])
    peers = [
        Contender("transformers SDPA", _calls(model, inputs)),
        Contender("transformers, reduce-overhead", make=lambda: _reduce_overhead(bench, model, inputs)),
        Contender("bert_fast, mask on the host", _calls(graphed, on_host)),
        Contender("bert_fast, captured by hand", make=captured),
        Contender("bert_fast.swap, eager", _calls(swapped, inputs)),
        Contender("bert_fast.swap, reduce-overhead", make=lambda: _reduce_overhead(bench, swapped, inputs)),
    ]
    if not bench.is_cuda:
        record.notes.append("ours is no graph: that needs a CUDA device")
    bench.time(record, Contender("ours", _calls(graphed, inputs)), peers, hides_host=False)
    eager = record.peer("transformers SDPA")
    found = None if eager is None or not eager.ratio else 1.0 / eager.ratio
    record.expect("x the latency of transformers SDPA", 0.6, found, is_upper=True)
    record.expect_faster("transformers, reduce-overhead", 0.95)


def _graph(model: Any, packed: PackedBatch, ids: Tensor) -> Callable[[], Any]:
    """A call that copies ids to their place, as any user of a graph must, and replays."""
    assert packed.ids is not None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(packed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(packed)
    place, fresh = packed.ids, ids.flatten().clone()

    def run() -> Any:
        place.copy_(fresh)
        graph.replay()
        return output

    return run


@torch.no_grad()
def squad_inference(bench: Bench, record: Record) -> None:
    """BERT-large with the head of question answering; lengths as SQuAD's, log-normal around 165, at most 384."""
    count = 256
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(5.1 + 0.35 * torch.randn(count, generator=generator)).clamp(40, 384).long()
    model = theirs(bench, "BertForQuestionAnswering", LARGE)
    swapped = bert_fast.swap(copy.deepcopy(model))
    inputs = batches(bench, lengths)
    order = lengths_of(inputs[0]).argsort().to(bench.device)
    parts = []
    for rows in order.split(64):  # the padded model's best: sorted, each part cut to its longest
        part = {name: x[rows] for name, x in inputs[0].items()}
        longest = int(lengths_of(part).max())
        parts.append({name: x[:, :longest].contiguous() for name, x in part.items()})

    def in_parts() -> list[Any]:
        return [model(**part) for part in parts]

    small = {name: x[:8] for name, x in inputs[0].items()}
    _verify(bench, record, model, _swapped_results(swapped), small)
    record.floor = bench.floor(moved=0, flops=flops(model, lengths_of(inputs[0])))
    peers = [Contender("transformers SDPA, sorted, batches of 64", [in_parts])]
    bench.time(record, Contender("ours", _calls(swapped, inputs)), peers, hides_host=False)
    record.facts["mean length"] = float(lengths_of(inputs[0]).double().mean())
    rate = len(lengths_of(inputs[0])) / (record.seconds or float("nan"))
    record.expect("sequences/s", 3900, rate, unless=None if bench.is_cuda else "needs a CUDA device")


# ---- training --------------------------------------------------------------------------------------------------------


def _labelled(batch: Batch, seed: int = 1) -> Batch:
    """15 % of the tokens have a label."""
    generator = torch.Generator().manual_seed(seed)
    is_labelled = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.15).to(batch["input_ids"].device)
    is_labelled[:, 0] = True
    labels = torch.where(is_labelled & batch["attention_mask"].bool(), batch["input_ids"], -100)
    return {**batch, "labels": labels}


def _step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None = None) -> Any:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss


def _gradients(model: nn.Module, batch: Batch, norm: str, word: str) -> list[Tensor]:
    """Loss and two gradients: one from the first layer's end, one from the bottom."""
    loss = _step(model, batch)
    named = dict(model.named_parameters())
    found = [loss.detach().clone()]
    for name in (norm, word):
        grad = named[name].grad
        assert grad is not None
        found.append(grad.clone())
    model.zero_grad(set_to_none=True)
    return found


def large_training(bench: Bench, record: Record) -> None:
    """Forward, backward and AdamW; 64 sequences, uniform lengths of 16 to 512: half the places are padding."""
    lengths = torch.randint(16, 513, (64,), generator=torch.Generator().manual_seed(0))
    lengths[0] = 512
    model = theirs(bench, "BertForMaskedLM", LARGE)
    own = ours(model)
    own.needs_labelled_only = True
    batch = _labelled(batches(bench, lengths)[0])
    small = {name: x[:4].contiguous() for name, x in batch.items()}

    word, norm = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.LayerNorm.weight"
    exact = _gradients(copy.deepcopy(model).float(), small, norm, word)
    their_error = relative_error(_gradients(model, small, norm, word), exact)
    found = _gradients(own, small, "bert.layers.0.output_norm.weight", "bert.embeddings.word.weight")
    bench.verify(record, found, exact, max(2 * their_error, ERROR_BOUNDS[bench.dtype]))
    record.facts["theirs' error"] = their_error
    del exact

    models = {"ours": own, "transformers SDPA": model}
    memory: dict[str, float] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name, part in models.items():
        part.train()
        optimizer = torch.optim.AdamW(part.parameters(), lr=1e-5, fused=bench.is_cuda or None)
        steps[name] = partial(_step, part, batch, optimizer)
        steps[name]()
        part.zero_grad(set_to_none=True)
        with peak_memory(bench) as peak:
            steps[name]()
        part.zero_grad(set_to_none=True)
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        resident = sum(x.numel() * x.element_size() for x in [*part.parameters(), *states])
        if peak:
            memory[name] = resident + peak[0]
    # Three times the forward pass, head not counted: it runs on 15 % of the tokens.
    record.floor = bench.floor(moved=0, flops=3 * flops(model, lengths_of(batch)))
    peers = [Contender("transformers SDPA", [steps["transformers SDPA"]])]
    bench.time(record, Contender("ours", [steps["ours"]]), peers, hides_host=False)
    record.expect_faster("transformers SDPA", 2.0)
    unless = None if bench.is_cuda else "needs a CUDA device"
    share = memory["ours"] / memory["transformers SDPA"] if len(memory) == 2 else None
    record.expect("of its memory", 0.6, share, is_upper=True, unless=unless)
    rate = len(batch["input_ids"]) / (record.seconds or float("nan"))
    record.expect("sequences/s", 500, rate, unless=unless)
    record.facts |= {f"bytes, {name}": amount for name, amount in memory.items()}


# ---- binaries --------------------------------------------------------------------------------------------------------


def binaries() -> dict[str, int]:
    """How many binaries each kernel has in this process."""
    found = {}
    for module_info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{module_info.name}")
        for name, function in vars(module).items():
            if name.endswith("_kernel"):
                caches = getattr(function, "device_caches", {})
                found[name] = sum(len(entry[0]) for entry in caches.values())
    return found


def tuned_kernels() -> list[str]:
    """Kernels that are timed when they are called."""
    return [
        name
        for module_info in pkgutil.iter_modules(kernels.__path__)
        for name, function in vars(importlib.import_module(f"{kernels.__name__}.{module_info.name}")).items()
        if name.endswith("_kernel") and type(function).__name__ in ("Autotuner", "Heuristics")
    ]


def random_batches(bench: Bench, record: Record, *, count: int = 1000) -> None:
    """Training steps of a small model on batches of every size."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    }
    config = transformers.BertConfig(**bench.size({"vocab_size": 1000, **sizes}, TINY)).to_dict()
    with bench.device:
        model = bert_fast.BertForMaskedLM(bert_fast.BertConfig.from_dict(config)).to(bench.dtype).train()
    generator = torch.Generator().manual_seed(0)
    longest = bench.size(512, 20)
    before = binaries()
    done = 0
    for index in range(bench.size(count, 2)):
        if not bench.has_time(3.0):
            record.notes.append("no time for all of them")
            break
        # Every third batch is short, so that both length buckets have many.
        high = longest if index % 3 else min(longest, 64)
        size = int(torch.randint(1, 9, (), generator=generator)) if not bench.is_dry else 1
        lengths = torch.randint(1, high + 1, (size,), generator=generator)
        mask = right_padded(lengths).to(bench.device)
        ids = torch.randint(5, config["vocab_size"], mask.shape, device=bench.device) * mask
        _step(model, _labelled({"input_ids": ids, "attention_mask": mask}, index))
        done += 1
    bench.synchronise()
    new = {name: amount - before.get(name, 0) for name, amount in binaries().items()}
    record.facts |= {"batches": done, **{name: amount for name, amount in new.items() if amount}}
    buckets = {name: _buckets(bench.dtype) if "attention" in name else 1 for name in new}
    worst = max(amount / buckets[name] for name, amount in new.items())
    unless = None if bench.is_cuda else "Triton's interpreter compiles nothing"
    record.expect("binaries of a (dtype, head size, length bucket)", 1, worst, is_upper=True, unless=unless)
    record.expect("kernels that tune themselves", 0, len(tuned_kernels()), is_upper=True)


def _buckets(dtype: torch.dtype) -> int:
    """Length buckets of the attention kernels, as their tables have them."""
    from bert_fast.kernels import attention

    return max(
        len({table(dtype, 64, length, True) for length in range(1, 513)})
        for table in (attention.forward_launch, attention.backward_launch)
    )

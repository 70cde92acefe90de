"""Ours and its peers behind one face, each at its best setting for batches of any shape."""

from __future__ import annotations

import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import bert_fast
from bert_fast.cli import models

from ..calls import Batch, Linear, floor, plain, prepacked
from ..workloads import ragged_lengths, token_batches
from .convert import CPU, MINILM, REPORT
from .report import FLOOR, OURS, OURS_BF16, OURS_INT8, PREPACKED, Precision

SDPA = "transformers SDPA"
MAX_TEXTS = 32


class Engine(ABC):
    """A model that runs.

    Attributes:
        setting: which of several was chosen by trial.
    """

    setting: str | None = None

    def inputs(self, batch: Batch) -> Any:
        """What the library takes; made before the clock starts."""
        return batch

    @abstractmethod
    def call(self, inputs: Any) -> Any: ...

    @abstractmethod
    def hidden(self, output: Any) -> Tensor:
        """(texts, length, hidden_size)."""

    def work(self, batches: Sequence[Batch]) -> Callable[[], None]:
        """The call that is timed: one pass over the batches."""
        prepared = [self.inputs(batch) for batch in batches]

        def run() -> None:
            for inputs in prepared:
                self.call(inputs)

        return run

    def states(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The hidden states of each batch."""
        return [self.hidden(self.call(self.inputs(batch))) for batch in batches]


@dataclass(frozen=True)
class Place:
    """A model's folder, and what runs it with so many threads.

    Attributes:
        root: where the model's folder is.
        name: of the model and its folder.
    """

    root: Path
    name: str
    threads: int
    is_dry: bool

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def load(self) -> Any:
        return models.load(self.folder, CPU)[0]

    def conversions(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        return found

    def converted(self, target: str) -> None:
        """Raises where the conversion failed."""
        if (reason := self.conversions()[target]["reason"]) is not None:
            raise RuntimeError(reason)

    def quickest(self, engines: dict[str, Engine]) -> Engine:
        """The fastest on eight ragged texts."""
        probe = token_batches(ragged_lengths(2 if self.is_dry else 8), 8)
        works = {name: engine.work(probe) for name, engine in engines.items()}
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(4):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                if turn:
                    times[name].append(time.perf_counter() - start)
        best = min(times, key=lambda name: statistics.median(times[name]))
        engines[best].setting = best
        return engines[best]


class Peer(NamedTuple):
    """
    Attributes:
        make: loads it; raises where that cannot be.
        only: the one model that it is measured with.
    """

    name: str
    make: Callable[[Place], Engine]
    precision: Precision = "fp32"
    only: str | None = None


class Torch(Engine):
    def __init__(self, model: Any) -> None:
        self.model = model

    def call(self, inputs: Any) -> Any:
        return self.model(**inputs)

    def hidden(self, output: Any) -> Tensor:
        hidden: Tensor = output[0]
        return hidden.float()


def compiled(place: Place) -> Engine:
    """With frozen weights, which inductor then lays out for oneDNN: on a CPU twice as fast as without."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    backend = "eager" if place.is_dry else "inductor"  # dry: traced, but no code made, which takes half a minute
    return Torch(torch.compile(place.load(), dynamic=True, backend=backend))


def ours(place: Place) -> Engine:
    return Torch(bert_fast.swap(place.load()))


def ours_in_bf16(place: Place) -> Engine:
    from bert_fast import _C

    if not _C.has_bfloat16():
        raise RuntimeError("this machine has no instruction for bfloat16, where products stay in fp32")
    return Torch(bert_fast.swap(place.load(), bf16=True))


class Floor(Torch):
    """The model's matrix products alone."""

    def __init__(self, model: Any, make: Callable[[nn.Linear, int], Linear]) -> None:
        super().__init__(model)
        self.make = make

    def work(self, batches: Sequence[Batch]) -> Callable[[], None]:
        return floor(self.model, [int(batch["attention_mask"].sum()) for batch in batches], self.make)


class OnnxRuntime(Engine):
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def inputs(self, batch: Batch) -> Any:
        return {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}

    def call(self, inputs: Any) -> Any:
        return self.session.run(None, inputs)

    def hidden(self, output: Any) -> Tensor:
        return torch.from_numpy(output[0])


def onnx_runtime(place: Place, suffix: str = "") -> Engine:
    """The graph with BERT's fusions, or the plain one, which the session optimises itself: which is faster varies."""
    place.converted("plain.onnx")
    if suffix:
        place.converted("int8.onnx")
    graphs = {"BERT fusions": f"fused{suffix}.onnx", "session's own optimisations": f"plain{suffix}.onnx"}
    paths = {setting: place.folder / name for setting, name in graphs.items()}
    return place.quickest(
        {setting: OnnxRuntime(path, place.threads) for setting, path in paths.items() if path.is_file()}
    )


class OpenVino(Engine):
    def __init__(self, path: Path, threads: int, precision: str = "f32") -> None:
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # no other contender is pinned to cores
        }
        self.request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def inputs(self, batch: Batch) -> Any:
        return {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}

    def call(self, inputs: Any) -> Any:
        return self.request.infer(inputs, share_inputs=True, share_outputs=True)

    def hidden(self, output: Any) -> Tensor:
        return torch.from_numpy(output[0].copy())


def openvino(place: Place, precision: str = "f32") -> Engine:
    place.converted("plain.onnx")
    return OpenVino(place.folder / "plain.onnx", place.threads, precision)


def openvino_int8(place: Place) -> Engine:
    place.converted("int8.xml")
    return OpenVino(place.folder / "int8.xml", place.threads)


class CTranslate2(Engine):
    """Takes lists of ids, without padding."""

    def __init__(self, place: Place, compute_type: str) -> None:
        place.converted("ctranslate2")
        import ctranslate2

        self.encoder = ctranslate2.Encoder(
            str(place.folder / "ctranslate2"),
            device="cpu",
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=place.threads,
        )

    def inputs(self, batch: Batch) -> Any:
        lengths = batch["attention_mask"].sum(1).tolist()
        return [row[:length].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)]

    def call(self, inputs: Any) -> Any:
        return self.encoder.forward_batch(inputs).last_hidden_state

    def hidden(self, output: Any) -> Tensor:
        import numpy as np

        return torch.from_numpy(np.array(output))


class SentenceTransformers(Engine):
    """Mean-pooled vectors by `encode`, which sorts all texts by length; from ids, so that no tokeniser is timed."""

    def __init__(self, place: Place) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer

        class OfIds(SentenceTransformer):
            def preprocess(self, inputs: Any, *_: Any, **__: Any) -> Batch:
                ones = [torch.ones_like(ids) for ids in inputs]
                padded, mask = pad_sequence(inputs, batch_first=True), pad_sequence(ones, batch_first=True)
                return {"input_ids": padded, "attention_mask": mask}

        transformer = Transformer(str(place.folder))
        self.model: Any = OfIds(modules=[transformer, Pooling(place.load().config.hidden_size, "mean")], device="cpu")

    def call(self, inputs: Any, output: str = "sentence_embedding") -> Any:
        return self.model.encode(
            inputs, batch_size=MAX_TEXTS, output_value=output, convert_to_numpy=False, show_progress_bar=False
        )

    def hidden(self, output: Any) -> Tensor:
        return pad_sequence(output, batch_first=True)

    def work(self, batches: Sequence[Batch]) -> Callable[[], None]:
        texts = [ids for batch in batches for ids in self._texts(batch)]
        return lambda: self.call(texts)

    def states(self, batches: Sequence[Batch]) -> list[Tensor]:
        return [self.hidden(self.call(self._texts(batch), "token_embeddings")) for batch in batches]

    @staticmethod
    def _texts(batch: Batch) -> list[Tensor]:
        return [ids[mask != 0] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


# Ours first, the floors last; transformers is the reference.
PEERS = (
    Peer(OURS, ours),
    Peer(OURS_BF16, ours_in_bf16, "bf16"),
    Peer(OURS_INT8, lambda place: Torch(bert_fast.swap(place.load(), int8=True)), "int8"),
    Peer(SDPA, lambda place: Torch(place.load())),
    Peer("torch.compile", compiled),
    Peer("ONNX Runtime", onnx_runtime),
    Peer("OpenVINO", openvino),
    Peer("CTranslate2", lambda place: CTranslate2(place, "float32")),
    Peer("sentence-transformers", SentenceTransformers, only=MINILM),
    Peer("transformers bf16", lambda place: Torch(place.load().bfloat16()), "bf16"),
    Peer("OpenVINO bf16", lambda place: openvino(place, "bf16"), "bf16"),
    Peer("ONNX Runtime int8", lambda place: onnx_runtime(place, "-int8"), "int8"),
    Peer("OpenVINO int8", openvino_int8, "int8"),
    Peer("CTranslate2 int8", lambda place: CTranslate2(place, "int8"), "int8"),
    Peer(FLOOR, lambda place: Floor(place.load(), plain)),
    Peer(PREPACKED, lambda place: Floor(place.load(), prepacked)),
)
BY_NAME = {peer.name: peer for peer in PEERS}

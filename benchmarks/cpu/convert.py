"""The models' folders, and what the peers need beside them; in a process of its own.

NNCF changes torch's functions when it is imported, so that nothing may be timed where it was.
"""

from __future__ import annotations

import io
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.cli import models

from ..calls import Batch
from ..facts import write_json
from ..workloads import ragged_lengths, token_batches

MINILM = "MiniLM"
BASE = "BERT-base"
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}

REPORT = "conversions.json"
CPU = torch.device("cpu")


def write_model(folder: Path, name: str, is_dry: bool) -> None:
    """A transformers folder: all-MiniLM-L6-v2's real weights, or random ones; with MiniLM's tokenizer."""
    if name == MINILM and not is_dry:
        shutil.copytree(models.demo_folder(), folder)
        return
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    with models.quiet():
        # CTranslate2 asks for the kind of positions, which transformers no longer writes.
        sizes = {**(TINY if is_dry else {}), "position_embedding_type": "absolute"}
        BertModel(BertConfig(**sizes)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(models.demo_folder(), local_files_only=True).save_pretrained(folder)


class _HiddenStates(nn.Module):
    """The graph that is exported: ids and mask in, the last hidden state out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found


def to_onnx(folder: Path, is_dry: bool) -> None:  # noqa: ARG001
    """Eager attention, traced: of SDPA, and of graphs by torch.export, ONNX Runtime fuses no attention."""
    model, _ = models.load(folder, CPU)
    model.set_attn_implementation("eager")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    names = ["input_ids", "attention_mask", "last_hidden_state"]
    torch.onnx.export(
        _HiddenStates(model).eval(),
        (1000 * mask, mask),
        folder / "plain.onnx",
        input_names=names[:2],
        output_names=names[2:],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
        opset_version=17,
        dynamo=False,
    )


def to_fused_onnx(folder: Path, is_dry: bool) -> None:  # noqa: ARG001
    from onnxruntime.transformers import optimizer

    config = models.load(folder, CPU)[0].config
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    fused = optimizer.optimize_model(str(folder / "plain.onnx"), model_type="bert", opt_level=0, **sizes)
    if (found := fused.get_fused_operator_statistics()["Attention"]) != config.num_hidden_layers:
        raise RuntimeError(f"attention was fused in {found} of {config.num_hidden_layers} layers")
    fused.save_model_to_file(str(folder / "fused.onnx"))


def to_int8_onnx(folder: Path, is_dry: bool) -> None:  # noqa: ARG001
    """Dynamic: weights are quantised here, one scale a channel, activations at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for kind in ("plain", "fused"):
        if (folder / f"{kind}.onnx").is_file():
            quantize_dynamic(
                folder / f"{kind}.onnx",
                folder / f"{kind}-int8.onnx",
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what fused operators give
            )


def to_int8_openvino(folder: Path, is_dry: bool) -> None:
    """Post-training quantisation of weights and activations: the fastest that OpenVINO has on a CPU."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    batches = [{name: x.numpy() for name, x in batch.items()} for batch in _calibration(folder, is_dry)]
    quantised = nncf.quantize(
        openvino.Core().read_model(folder / "plain.onnx"),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
    openvino.save_model(quantised, folder / "int8.xml", compress_to_fp16=False)


def _calibration(folder: Path, is_dry: bool) -> list[Batch]:
    """Real texts for the accuracy, and random ids, which the workloads are made of."""
    texts = (files("bert_fast") / "data" / "demo.txt").read_text(encoding="utf-8").splitlines()
    _, tokenizer = models.load(folder, CPU)
    real = models.batches(tokenizer, [text for text in texts if text], 8, 128, CPU)
    random = token_batches(ragged_lengths(96), 8)
    batches = [batch for pair in zip(real, random, strict=False) for batch in pair]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches[: 2 if is_dry else 24]]


def to_ctranslate2(folder: Path, is_dry: bool) -> None:  # noqa: ARG001
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(folder / "ctranslate2"))


CONVERSIONS: dict[str, Callable[[Path, bool], None]] = {
    "plain.onnx": to_onnx,
    "fused.onnx": to_fused_onnx,
    "int8.onnx": to_int8_onnx,
    "int8.xml": to_int8_openvino,
    "ctranslate2": to_ctranslate2,
}


def convert(root: Path, names: Iterable[str], is_dry: bool) -> None:
    """Fills root/NAME for each model; root/NAME/conversions.json says how long each step took or why it failed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in names:
        write_model(root / name, name, is_dry)
        found: dict[str, dict[str, Any]] = {}
        for target, make in CONVERSIONS.items():
            start = time.perf_counter()
            try:
                with models.quiet(), redirect_stdout(io.StringIO()):  # NNCF draws bars
                    make(root / name, is_dry)
                reason = None
            except Exception as error:  # a peer may be missing on this machine; the others still tell something
                reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
            found[target] = {"seconds": time.perf_counter() - start, "reason": reason}
        write_json(root / name / REPORT, found)

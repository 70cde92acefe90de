"""Checkpoints in Hugging Face's format: one table of names, read both ways, and the files around it."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import BertConfig

__all__ = ["apply", "load", "save", "to_hugging_face", "to_ours"]

# Ours, theirs; {} is the number of a layer. Each stands for itself and for everything below it.
NAMES = (
    ("embeddings.word", "embeddings.word_embeddings"),
    ("embeddings.position", "embeddings.position_embeddings"),
    ("embeddings.token_type", "embeddings.token_type_embeddings"),
    ("embeddings.norm", "embeddings.LayerNorm"),
    ("layers.{}.query", "encoder.layer.{}.attention.self.query"),
    ("layers.{}.key", "encoder.layer.{}.attention.self.key"),
    ("layers.{}.value", "encoder.layer.{}.attention.self.value"),
    ("layers.{}.attention_output", "encoder.layer.{}.attention.output.dense"),
    ("layers.{}.attention_norm", "encoder.layer.{}.attention.output.LayerNorm"),
    ("layers.{}.intermediate", "encoder.layer.{}.intermediate.dense"),
    ("layers.{}.output", "encoder.layer.{}.output.dense"),
    ("layers.{}.output_norm", "encoder.layer.{}.output.LayerNorm"),
    ("pooler", "pooler.dense"),
    ("mlm.transform", "cls.predictions.transform.dense"),
    ("mlm.norm", "cls.predictions.transform.LayerNorm"),
    ("mlm.bias", "cls.predictions.bias"),
    ("nsp", "cls.seq_relationship"),
    ("classifier", "classifier"),
    ("qa", "qa_outputs"),
)

# In a checkpoint with a head the encoder's names stand behind this prefix, on both sides.
PREFIX = "bert."

TIED_WEIGHT = "cls.predictions.decoder.weight"
TIED_BIAS = "cls.predictions.decoder.bias"
BIAS = "cls.predictions.bias"
WORDS = "bert.embeddings.word_embeddings.weight"


def _translate(name: str, source: int, target: int) -> str | None:
    prefix = PREFIX if name.startswith(PREFIX) else ""
    rest = name.removeprefix(prefix)
    for row in NAMES:
        pattern = re.escape(row[source]).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias)?"
        match = re.fullmatch(pattern, rest)
        if match:
            *numbers, suffix = match.groups()
            return prefix + row[target].format(*numbers) + (suffix or "")
    return None


def to_hugging_face(name: str) -> str | None:
    """Hugging Face's name of one of our parameters, None where there is none."""
    return _translate(name, 0, 1)


def to_ours(name: str) -> str | None:
    """Our name of one of Hugging Face's parameters, None where there is none."""
    return _translate(name, 1, 0)


def load(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a folder, under Hugging Face's names.

    Reads model.safetensors, its shards, or pytorch_model.bin or its shards; pickles with weights_only=True alone.

    Raises:
        FileNotFoundError: none of them is there.
    """
    folder = Path(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [name]
        elif index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            continue
        weights: dict[str, Tensor] = {}
        for file in files:
            weights.update(_read(folder / file))
        return {_modern(key): value for key, value in weights.items()}
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def _modern(name: str) -> str:
    """Names of checkpoints converted from TensorFlow: LayerNorm.gamma and LayerNorm.beta."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def _translated(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor), with the encoder's prefix as this model has it."""
    has_prefix = any(name.startswith(PREFIX) for name in weights)
    wants_prefix = any(name.startswith(PREFIX) for name in model.state_dict())
    for name, value in weights.items():
        ours = to_ours(name)
        if ours is None:
            continue
        is_encoder = ours.startswith((PREFIX, "embeddings.", "layers.", "pooler."))
        if is_encoder and has_prefix and not wants_prefix:
            ours = ours.removeprefix(PREFIX)
        elif is_encoder and wants_prefix and not has_prefix:
            ours = PREFIX + ours
        yield ours, value


def apply(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies tensors under Hugging Face's names into one of our models.

    A head that the checkpoint lacks keeps its initial weights, with a warning; what the model lacks is left out.

    Raises:
        ValueError: an encoder weight is missing, a shape differs, or the decoder is not tied to the word embeddings.
    """
    weights = dict(weights)
    if any(name.startswith("mlm.") for name in model.state_dict()):
        words = WORDS if WORDS in weights else WORDS.removeprefix(PREFIX)
        for decoder, tied in ((TIED_WEIGHT, words), (TIED_BIAS, BIAS)):
            if decoder in weights and tied in weights and not torch.equal(weights[decoder], weights[tied]):
                raise ValueError(f"{decoder} differs from {tied}; only a tied decoder is supported")
        if TIED_BIAS in weights:
            weights[BIAS] = weights[TIED_BIAS]

    own = model.state_dict()
    state = {name: value for name, value in _translated(model, weights) if name in own}
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{to_hugging_face(name)} has shape {tuple(value.shape)}; "
                f"the configuration gives {tuple(own[name].shape)}"
            )
    missing = sorted(own.keys() - state.keys())
    heads = [name for name in missing if not name.removeprefix(PREFIX).startswith(("embeddings.", "layers."))]
    if len(heads) < len(missing):
        lacking = [to_hugging_face(name) or name for name in missing if name not in heads]
        raise ValueError(f"the checkpoint lacks {', '.join(lacking)}")
    if heads:
        warnings.warn(
            f"newly initialised, not in the checkpoint: {', '.join(to_hugging_face(name) or name for name in heads)}",
            stacklevel=3,
        )
    model.load_state_dict(state, strict=False)


def save(
    model: nn.Module, config: BertConfig, architecture: str, path: str | Path, *, num_labels: int | None = None
) -> None:
    """Writes config.json and model.safetensors under Hugging Face's names; each file appears whole or not at all.

    Args:
        model: one of ours.
        config: its configuration.
        architecture: transformers' class for it.
        path: the folder; made if it is not there.
        num_labels: classes of a classifier.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in model.state_dict().items():
        theirs = to_hugging_face(name)
        assert theirs is not None, name
        tensors[theirs] = value.detach().cpu().contiguous()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    entries = {"architectures": [architecture], "dtype": dtype, **config.to_dict()}
    if num_labels is not None:  # transformers counts the names
        entries["id2label"] = {str(index): f"LABEL_{index}" for index in range(num_labels)}
        entries["label2id"] = {f"LABEL_{index}": index for index in range(num_labels)}
    text = json.dumps(entries, indent=2)
    with _whole(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with _whole(folder / "config.json") as part:
        part.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A name beside `file` to write to; it becomes `file` if nothing is raised."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)

"""A model that embeds blocks, and what its vectors depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...swap import swap
from ..data.texts import OnProblem
from ..embeddings import embed_texts, load_sentence_transformer
from ..settings import Precision, at_least, one_of
from ..task import Model
from .work import file_hash

__all__ = ["Embedder", "Options", "fingerprint", "open_model", "prompt_of", "unit"]

NOT_OF_THE_VECTORS = ("tokens_per_batch", "device", "on_problem", "columns")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How texts are embedded.

    Attributes:
        block: texts that are embedded and written together.
        tokens_per_batch: see embed_texts; it changes vectors by rounding alone.
        max_length: tokens of the longest text; None: as the model says.
        prompt: put before each text.
        prompt_name: the prompt of this name, such as "document", that the model brings; without both it is the model's
            default prompt, if it has one.
        normalize: whether vectors are scaled to length 1.
        dtype: of the file.
        precision: of the model.
        int8: whether products are in 8 bits, on CPUs; see swap.
        device: such as "cuda:1"; None: a GPU if there is one.
        keep_text: whether a .parquet file gets the texts, too.
        on_problem, columns: see read_texts.

    Raises:
        ValueError: a value is not allowed.
    """

    block: int = 8192
    tokens_per_batch: int = 16_384
    max_length: int | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    normalize: bool = False
    dtype: Literal["float32", "float16"] = "float32"
    precision: Precision = "fp32"
    int8: bool = False
    device: str | None = None
    keep_text: bool = False
    on_problem: OnProblem = "refuse"
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("block", "tokens_per_batch"):
            at_least(name, getattr(self, name), 1)
        one_of("dtype", self.dtype, Literal["float32", "float16"])
        one_of("precision", self.precision, Precision)
        one_of("on_problem", self.on_problem, OnProblem)
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError(
                f"prompt is {self.prompt!r} and prompt_name is {self.prompt_name!r}; one of them is needed"
            )

    def of_the_vectors(self) -> dict[str, Any]:
        """Those that change the vectors, or what stands beside them."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_OF_THE_VECTORS}


def open_model(source: str, options: Options) -> Model:
    """A SentenceTransformer, swapped, in evaluation mode.

    Args:
        source: a folder, or a name on the hub.
        options: precision, int8, device and max_length are used.

    Raises:
        ValueError: fp16 without a GPU.
        OSError, ValueError: see load_sentence_transformer.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.precision == "fp16" and device.type != "cuda":
        raise ValueError("precision is 'fp16', which needs a GPU; fp32 and bf16 work everywhere")
    model = load_sentence_transformer(source, options.max_length)
    model.module.eval().to(device, DTYPES[options.precision])
    swap(model.module, int8=options.int8)
    return model


class Embedder:
    """Calls a model on blocks of texts.

    Args:
        source, options: see open_model.

    Raises:
        ValueError: the model has no prompt of this name.
    """

    def __init__(self, source: str, options: Options) -> None:
        self.options = options
        self.model = open_model(source, options)
        self.prompt = prompt_of(self.model, options.prompt, options.prompt_name)

    def __call__(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """(texts, dimensions) of the options' dtype.

        Raises:
            ValueError: a vector is not finite in this dtype.
        """
        vectors = embed_texts(self.model, texts, self.options.tokens_per_batch, prompt=self.prompt)
        if self.options.normalize:
            vectors = unit(torch.from_numpy(vectors)).numpy()
        with np.errstate(over="ignore"):
            result = vectors.astype(self.options.dtype)
        finite = np.isfinite(result).all(1)
        if not finite.all():
            text = texts[int(finite.argmin())]
            raise ValueError(f"the vector of the text {text[:80]!r} is not finite in {self.options.dtype}")
        return result


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """(rows, dimensions) scaled to length 1; zeros stay."""
    return torch.nn.functional.normalize(vectors, dim=1)


def prompt_of(model: Model, prompt: str | None, name: str | None) -> str | None:
    """The prompt itself, or the model's of this name; None: neither is asked for.

    Raises:
        ValueError: the model has none of this name.
    """
    if name is None:
        return prompt
    prompts: Any = model.module.prompts
    if name not in prompts:
        there = ", ".join(map(repr, prompts)) or "none"
        raise ValueError(f"prompt_name is {name!r}; the model has {there}")
    return str(prompts[name])


# ---- which model it is -----------------------------------------------------------------------------------------------

SUFFIXES = (".bin", ".json", ".model", ".py", ".safetensors", ".txt")


def fingerprint(source: str) -> str:
    """SHA-256, in hexadecimal, of the files that a model is read from, wherever they are."""
    folder = _folder(source)
    modules = folder / "modules.json"
    names = [entry["path"] for entry in json.loads(modules.read_text(encoding="utf-8"))] if modules.is_file() else []
    folders = dict.fromkeys([folder, *(folder / name for name in names)])
    digest = hashlib.sha256()
    for file in sorted(file for each in folders if each.is_dir() for file in each.iterdir()):
        if file.suffix in SUFFIXES and file.is_file():
            digest.update(f"{file.relative_to(folder).as_posix()} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def _folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    load_sentence_transformer(source)  # fetches what it needs
    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    try:
        return Path(snapshot_download(source, local_files_only=True, cache_dir=cache))
    except LocalEntryNotFoundError:
        if "/" in source:
            raise
        # sentence-transformers' own models are known to it without their owner's name.
        return Path(snapshot_download(f"sentence-transformers/{source}", local_files_only=True, cache_dir=cache))

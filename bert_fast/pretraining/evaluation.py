"""How good a model is on held-out text."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .batches import VocabularyLike, mask
from .feed import Feed
from .monitor import Evaluation
from .objective import SUMS
from .stream import PackStream

# Text is always masked like this, so that runs can be compared.
RATE, SEED = 0.15, 0


def evaluate(
    accelerator: Any,
    objective: nn.Module,
    stream: PackStream,
    vocabulary: VocabularyLike,
    *,
    packs: int,
    step: int = 0,
) -> Evaluation:
    """The loss and accuracy at 15 % of the tokens, masked one by one, and the accuracy of next-sentence prediction.

    Every process calls it.

    Args:
        accelerator: accelerate's, which has prepared the objective.
        objective: an Objective, wrapped or not; it is in the training mode afterwards.
        stream: of held-out text.
        vocabulary: of its tokens.
        packs: how many are read at most; never more than there are.
        step: steps done, for the record.
    """
    started = time.perf_counter()
    number, processes = min(packs, stream.packs_of_pass()), accelerator.num_processes
    feed = Feed(stream, vocabulary, start=accelerator.process_index, step=processes)
    # Tokens, and what the objective says.
    sums = torch.zeros(1 + len(SUMS), dtype=torch.float64, device=accelerator.device)
    objective.eval()
    # Every process makes as many calls, since sharded weights are gathered in each.
    for pack in itertools.islice(feed, math.ceil(number / processes)):
        batch = mask(pack.batch, pack.classes, pack.id, vocabulary, rate=RATE, seed=SEED).to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            found = objective(batch, is_judged=True)[0]
        if pack.number < number:
            sums[0] += batch.packed.total_tokens
            sums[1:] += found
    objective.train()
    if isinstance(objective, FSDPModule):
        objective.reshard()  # without a backward pass its own weights have stayed whole
    tokens, masked, correct, predicted, _, pair_correct, pairs = accelerator.reduce(sums, reduction="sum").tolist()
    return Evaluation(
        step=step,
        mlm_loss=masked / max(predicted, 1),
        mlm_accuracy=correct / max(predicted, 1),
        nsp_accuracy=pair_correct / pairs if pairs else None,
        tokens=int(tokens),
        seconds=time.perf_counter() - started,
    )

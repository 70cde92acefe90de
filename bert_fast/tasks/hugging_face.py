"""What the tasks on transformers' models share: loading, tokens, and calls on batches of about equal lengths."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .batching import budget_batches
from .loop import DivergedError, judged
from .task import Model

__all__ = ["encode", "is_evaluating", "load_model", "longest", "outputs", "quiet", "trainer"]


@contextmanager
def quiet(*, has_warnings: bool = False) -> Iterator[None]:
    """Bars and notes of transformers and sentence-transformers, such as that a head is new, stay off the screen.

    Args:
        has_warnings: whether Python's warnings are shown.
    """
    import transformers

    logger = logging.getLogger("sentence_transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    theirs: Any = transformers.utils.logging
    verbosity, has_bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if not has_warnings:
                warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(verbosity)
        if has_bars:
            theirs.enable_progress_bar()
        logger.setLevel(level)


@contextmanager
def is_evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode is as it was."""
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(was_training)


def load_model(auto_class: str, source: str, *, is_whole: bool = False, **config: Any) -> Model:
    """A transformers model in float32 and its fast tokenizer.

    Args:
        auto_class: such as "AutoModelForSequenceClassification".
        source: a folder, which is read without a network, or a name on the hub.
        is_whole: whether all weights must be there; if not, those that are missing, such as a head's, are new.
        config: attributes of the configuration, such as num_labels.

    Raises:
        OSError, ValueError: transformers' own; there is no such model, no fast tokenizer, or weights are missing.
    """
    import transformers

    is_local = Path(source).is_dir()
    if is_local and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} holds no model; its config.json is missing")
    if not is_local and (Path(source).is_absolute() or len(Path(source).parts) > 2):
        raise FileNotFoundError(f"{source} is no folder, nor can it be a name on the hub")
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=is_local)
        module, found = getattr(transformers, auto_class).from_pretrained(
            source, local_files_only=is_local, dtype=torch.float32, output_loading_info=True, **config
        )
    if not tokenizer.is_fast:
        raise ValueError(f"{source} has no fast tokenizer, tokenizer.json, which is needed")
    missing = sorted(found["missing_keys"])
    if is_whole and missing:
        raise ValueError(f"{source} has no weights {', '.join(missing[:3])}, so it was not trained as {auto_class}")
    return Model(module, tokenizer)


def longest(model: Model, max_length: int | None) -> int:
    """Tokens that a text may have: `max_length`, or as many as the model has positions.

    Raises:
        ValueError: the model has fewer positions, or they hardly hold the special tokens.
    """
    config: Any = model.module.config
    positions = getattr(config, "max_position_embeddings", model.tokenizer.model_max_length)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # where positions begin
    positions = min(positions, model.tokenizer.model_max_length)
    if max_length is None:
        return int(positions)
    least = max(3, model.tokenizer.num_special_tokens_to_add(pair=True))  # with less, nothing would be cut
    if not least <= max_length <= positions:
        raise ValueError(f"max_length is {max_length}; it must be within {least} and the model's {positions}")
    return max_length


def encode(
    model: Model, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int, **options: Any
) -> list[dict[str, list[int]]]:
    """Texts, or pairs of them, as the tokenizer's ids, cut at `max_length` tokens.

    Args:
        model: whose tokenizer is used.
        texts: first texts.
        pairs: second texts, of each text or of none.
        max_length: tokens, with special ones.
        options: of the tokenizer.
    """
    if not texts:
        return []
    encoded = model.tokenizer(
        list(texts), None if pairs is None else list(pairs), truncation=True, max_length=max_length, **options
    )
    return [{name: values[row] for name, values in encoded.items()} for row in range(len(texts))]


def outputs(
    model: Model, encoded: Sequence[dict[str, list[int]]], tokens_per_batch: int
) -> Iterator[tuple[list[int], Any]]:
    """The model's outputs by batches of texts of about equal length, in evaluation mode.

    Args:
        model: which is called.
        encoded: from encode.
        tokens_per_batch: see budget_batches.

    Yields:
        the texts' indices, and what the model returns for them.

    Raises:
        DivergedError: the model returns NaN or infinite numbers.
    """
    device = next(model.module.parameters()).device
    lengths = [len(row["input_ids"]) for row in encoded]
    with is_evaluating(model.module):
        for indices in budget_batches(lengths, tokens_per_batch):
            batch = model.tokenizer.pad([encoded[index] for index in indices], return_tensors="pt")
            output = model.module(**batch.to(device))
            if not all(torch.isfinite(values).all() for values in output.to_tuple()):
                raise DivergedError("the model's outputs are NaN or infinite; a lower learning_rate may help")
            yield indices, output


def trainer(
    model: Model,
    rows: Sequence[dict[str, Any]],
    arguments: dict[str, Any],
    collator: Any,
    loss: Callable[..., torch.Tensor] | None = None,
) -> Any:
    """A Trainer, Judged, on rows as encode makes them, with labels.

    Args:
        model: swapped.
        rows: training examples.
        arguments: see loop.arguments.
        collator: of transformers, which makes batches.
        loss: (outputs, labels, num_items_in_batch) -> scalar; None: the model's own.
    """
    import transformers

    with quiet():
        result = judged(transformers.Trainer)(
            model=model.module,
            args=transformers.TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=rows,
            eval_dataset=rows[:1],  # there must be one; Judged reads its own
            data_collator=collator,
            processing_class=model.tokenizer,
            compute_loss_func=loss,
        )
    # Trainer takes **kwargs in a forward for a loss that is already divided by all of the step's examples, which
    # those of encoders are not: with accumulation their gradients would be too large.
    result.model_accepts_loss_kwargs = False
    return result

"""bert-fast demo: one real model, twice, on ragged text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import bert_fast

from . import models

BATCH_SIZE = 32
MAX_LENGTH = 256
MAX_DIFFERENCE = {"cpu": 1e-5, "cuda": 2e-5}
MIN_COSINE = 0.99999

QUERIES = (
    "When does the last boat leave?",
    "How do I stop bread from going stale?",
    "What should I do about a swarm of bees?",
)


class TextsError(ValueError):
    """The user's file holds nothing to encode."""


def read_texts(file: Path | None) -> list[str]:
    """The lines that are not empty.

    Raises:
        TextsError: the file is not UTF-8, or has no text.
    """
    if file is None:
        content = (files("bert_fast") / "data" / "demo.txt").read_text(encoding="utf-8")
    else:
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TextsError(f"{file} is not UTF-8 at byte {error.start}") from None
    texts = [line.strip() for line in content.splitlines() if line.strip()]
    if not texts:
        raise TextsError(f"{file} holds no text")
    return texts


def run(console: Console, file: Path | None, queries: Sequence[str], rounds: int, device: torch.device) -> bool:
    """Shows parity, speed and a search; whether the answers were the same."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    texts = read_texts(file)
    with console.status("loading all-MiniLM-L6-v2 twice"):
        original, tokenizer = models.load(models.demo_folder(), device)
        swapped = bert_fast.swap(models.load(models.demo_folder(), device)[0])
    batches = models.batches(tokenizer, texts, BATCH_SIZE, MAX_LENGTH, device)
    with torch.inference_mode():
        is_same = show_parity(console, original, swapped, batches, device)
        show_speed(console, original, swapped, tokenizer, texts, rounds, device)
        show_search(console, swapped, tokenizer, texts, queries or QUERIES, device)
    console.print()
    console.print(str(bert_fast.report(swapped)), highlight=False, markup=False, soft_wrap=True)
    return is_same


def show_parity(
    console: Console,
    original: nn.Module,
    swapped: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    device: torch.device,
) -> bool:
    """The largest difference of a hidden value and the smallest cosine of an embedding, over all texts."""
    difference, cosine = 0.0, 1.0
    for batch in batches:
        tokens = batch["attention_mask"].bool()
        theirs, ours = original(**batch).last_hidden_state[tokens], swapped(**batch).last_hidden_state[tokens]
        difference = max(difference, (theirs - ours).abs().max().item())
        pairs = models.embed(original, batch).double() * models.embed(swapped, batch).double()
        cosine = min(cosine, pairs.sum(-1).min().item())
    limit = MAX_DIFFERENCE[device.type]
    is_same = difference <= limit and cosine >= MIN_COSINE
    table = Table(title="The same answers", title_justify="left")
    table.add_column("against transformers, float32")
    table.add_column("found", justify="right")
    table.add_column("allowed", justify="right")
    table.add_row("largest difference of a hidden value", f"{difference:.2e}", f"{limit:.0e}")
    table.add_row("smallest cosine of an embedding", f"{cosine:.7f}", f"{MIN_COSINE}")
    console.print(table)
    if not is_same:
        console.print("[bold red]The answers differ.[/]")
    return is_same


def show_speed(
    console: Console,
    original: nn.Module,
    swapped: nn.Module,
    tokenizer: object,
    texts: Sequence[str],
    rounds: int,
    device: torch.device,
) -> None:
    """Both models on the same batches, in turn; medians."""
    table = Table(title="Faster", title_justify="left")
    table.add_column(f"{len(texts)} texts, batches of {BATCH_SIZE}")
    for name in ("padding", "transformers", "bert_fast", "speed-up"):
        table.add_column(name, justify="right")
    orders = {"in the order given": list(texts), "sorted by length": sorted(texts, key=len)}
    for name, ordered in orders.items():
        batches = models.batches(tokenizer, ordered, BATCH_SIZE, MAX_LENGTH, device)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        places = sum(batch["attention_mask"].numel() for batch in batches)

        def pass_over(model: nn.Module, batches: Sequence[dict[str, Tensor]] = batches) -> None:
            for batch in batches:
                model(**batch)

        theirs, ours = interleaved(
            console, name, rounds, device, lambda: pass_over(original), lambda: pass_over(swapped)
        )
        table.add_row(
            name, f"{places / tokens:.2f}x", f"{theirs * 1e3:,.0f} ms", f"{ours * 1e3:,.0f} ms", f"{theirs / ours:.2f}x"
        )
    console.print(table)
    import transformers

    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    console.print(
        f"float32 on {device}{threads}; transformers {transformers.__version__} (SDPA), torch {torch.__version__}; "
        f"medians of {rounds} rounds, in turn; useful tokens: {tokens:,}",
        style="dim",
    )


def interleaved(
    console: Console, name: str, rounds: int, device: torch.device, *sides: Callable[[], None]
) -> list[float]:
    """Median seconds of each side, A B A B; one round of warm-up before."""
    seconds: list[list[float]] = [[] for _ in sides]
    for count in track(range(rounds + 1), f"timing, {name}", console=console, transient=True):
        for side, times in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if count > 0:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def show_search(
    console: Console,
    swapped: nn.Module,
    tokenizer: object,
    texts: Sequence[str],
    queries: Sequence[str],
    device: torch.device,
) -> None:
    """The nearest texts to each query, by cosine."""
    vectors = torch.cat(
        [models.embed(swapped, batch) for batch in models.batches(tokenizer, texts, BATCH_SIZE, MAX_LENGTH, device)]
    )
    table = Table(title="A search in the texts", title_justify="left", show_lines=True)
    table.add_column("query")
    table.add_column("cosine", justify="right")
    table.add_column("nearest texts", ratio=1)
    for query in queries:
        (batch,) = models.batches(tokenizer, [query], 1, MAX_LENGTH, device)
        scores = (vectors @ models.embed(swapped, batch)[0]).cpu()
        best = scores.topk(min(2, len(texts)))
        table.add_row(
            query,
            "\n".join(f"{score:.3f}" for score in best.values.tolist()),
            "\n".join(shorten(texts[index]) for index in best.indices.tolist()),
        )
    console.print(table)


def shorten(text: str, length: int = 72) -> str:
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."

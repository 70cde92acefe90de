"""bert-fast embed, search and rerank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bert_fast.tasks import vectors
from bert_fast.tasks.data.problems import bad_line
from bert_fast.tasks.data.runs import read_candidates, read_run
from bert_fast.tasks.data.texts import find_texts, read_texts
from bert_fast.tasks.reranking import rerank_to
from bert_fast.tasks.use import open_cross_encoder
from bert_fast.tasks.vectors import Found, Options, Searcher

from .lines import say, write_lines


def _options(values: Mapping[str, Any]) -> Options:
    names = {field.name for field in fields(Options)}
    return Options(**{name: value for name, value in values.items() if name in names})


# ---- embed -----------------------------------------------------------------------------------------------------------


def embed(console: Console, values: Mapping[str, Any]) -> None:
    """Embeds texts as the options say, and says how it goes; see bert_fast.tasks.vectors.embed."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("reading", total=None)

        def show(done: vectors.Progress) -> None:
            rate = (done.texts - done.resumed) / done.seconds if done.seconds else 0.0
            progress.update(bar, description=f"{done.texts:,} texts, {rate:,.0f} a second")

        summary = vectors.embed(
            values["model"],
            list(values["sources"]),
            values["out"],
            options=_options(values),
            engine=values["engine"],
            cluster=_cluster(values) if values["engine"] == "ray" else None,
            on_progress=show,
        )
    rest = [f"{summary.resumed:,} of them done before"] if summary.resumed else []
    rest += [f"{summary.empty:,} empty"] if summary.empty else []
    rest += [f"{summary.bad:,} could not be read"] if summary.bad else []
    say(console, ", ".join([f"{summary.rows:,} vectors of {summary.dimensions} numbers in {summary.out}", *rest]))


def _cluster(values: Mapping[str, Any]) -> Any:
    from bert_fast.tasks.vectors.ray_engine import Cluster

    names = ("workers", "cpus", "gpus", "address")
    return Cluster(**{name: values[name] for name in names if values[name] is not None})


# ---- search ----------------------------------------------------------------------------------------------------------


def search(console: Console, values: Mapping[str, Any]) -> None:
    """Finds texts for queries; tables, or a JSON object a line; see bert_fast.tasks.vectors.searcher."""
    queries, ids = _queries(values)
    searcher = Searcher(
        values["model"],
        values["vectors"],
        values["texts"],
        options=_options(values),
        is_other=values["other_model"],
        engine=values["engine"],
        metric=values["metric"],
        index=values["index"],
    )
    results = searcher(queries, values["top"])
    if values["out"] is None:
        for query, found in zip(queries, results, strict=True):
            _show(console, query, found)
        return
    lines = [
        json.dumps(
            {**({} if name is None else {"id": name}), "query": query, "results": [_as_dict(hit) for hit in found]},
            ensure_ascii=False,
        )
        for name, query, found in zip(ids, queries, results, strict=True)
    ]
    write_lines(values["out"], lines)
    say(console, f"results of {len(queries):,} queries in {values['out']}")


def _queries(values: Mapping[str, Any]) -> tuple[list[str], list[str | None]]:
    """The texts, none of them blank, and their ids, if they have any.

    Raises:
        DataError: a query of the file is blank, or there is none.
        ValueError: one of the command line is blank.
    """
    if values["file"] is None:
        if not all(query.strip() for query in values["queries"]):
            raise ValueError("--query is blank; a text is needed")
        return list(values["queries"]), [None] * len(values["queries"])
    rows = list(read_texts(find_texts([values["file"]])))
    for row in rows:
        if not row.text.strip():
            raise bad_line(row.file, row.line, "a blank query")
    if not rows:
        raise bad_line(values["file"], None, "no queries")
    return [row.text for row in rows], [row.id for row in rows]


def _as_dict(hit: Found) -> dict[str, Any]:
    every = {"row": hit.row, "score": hit.score, "id": hit.id, "text": hit.text}
    return {name: value for name, value in every.items() if value is not None}


def _show(console: Console, query: str, found: Sequence[Found]) -> None:
    table = Table(title=Text(query), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("score", justify="right")
    table.add_column("row", justify="right")
    table.add_column("text")
    for hit in found:
        table.add_row(f"{hit.score:.4f}", str(hit.row), Text(hit.text or hit.id or ""))
    console.print(table)


# ---- rerank ----------------------------------------------------------------------------------------------------------


def rerank(console: Console, values: Mapping[str, Any]) -> None:
    """Reranks candidates; see bert_fast.tasks.reranking."""
    if values["queries"] is None:
        candidates = read_candidates(values["source"])
    else:
        candidates = read_run(values["source"], values["queries"], values["corpus"], values["columns"])
    model = open_cross_encoder(
        values["model"], max_length=values["max_length"], device=values["device"], int8=values["int8"]
    )
    count = rerank_to(values["out"], model, candidates, top=values["top"], tokens_per_batch=values["tokens_per_batch"])
    say(console, f"candidates of {count:,} queries in {values['out']}")

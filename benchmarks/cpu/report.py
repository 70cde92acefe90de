"""What a run finds, and the tables that are printed of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..table import duration

OURS = "bert_fast"
OURS_BF16 = "bert_fast bf16"
OURS_INT8 = "bert_fast int8"
FLOOR = "floor: torch's matrix products"
PREPACKED = "floor: oneDNN's, weights prepacked"

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: dict[Precision, str] = {"fp32": OURS, "bf16": OURS_BF16, "int8": OURS_INT8}  # ours in each

HEADINGS = {
    "sentence-transformers": "sentence- transformers",
    FLOOR: "ours/floor, torch",
    PREPACKED: "ours/floor, oneDNN",
}


def is_floor(name: str) -> bool:
    return name in (FLOOR, PREPACKED)


@dataclass
class Entry:
    """One contender of a row.

    Attributes:
        precision: of its products.
        seconds: median of one pass over the workload; None where it was not timed.
        quartiles: the first, the median and the third.
        ratio, ratio_same: its time over ours in fp32, and over ours in its own precision.
        difference: largest absolute difference of a real token's hidden state to transformers'; for vectors alone,
            of a mean-pooled vector.
        cosine: smallest cosine of a text's mean-pooled vector to transformers'.
        first_seconds: the first pass: compilation, memory, caches.
        reason: why it was not timed.
        note: what a reader of its time should know.
    """

    name: str
    precision: Precision = "fp32"
    seconds: float | None = None
    quartiles: list[float] | None = None
    ratio: float | None = None
    ratio_same: float | None = None
    difference: float | None = None
    cosine: float | None = None
    first_seconds: float | None = None
    reason: str | None = None
    note: str | None = None


@dataclass
class Record:
    """One row.

    Attributes:
        rounds: counted; each contender has one turn in each.
        entries: ours first, then the peers and the floors.
        facts: of the workload.
        scores: Spearman correlations.
        cells: of a grid.
        reason: why nothing was measured.
        problem: an exception, or a wrong result of ours.
    """

    name: str
    model: str
    rounds: int = 0
    entries: list[Entry] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    problem: str | None = None

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)

    def set_times(self, times: Mapping[str, list[float]]) -> None:
        """Quartiles by name into the entries, and the ratios."""
        for entry in self.entries:
            if entry.name in times:
                entry.quartiles = times[entry.name]
                entry.seconds = entry.quartiles[1]
        self.set_ratios()

    def set_ratios(self) -> None:
        for entry in self.entries:
            if entry.seconds is not None:
                entry.ratio = self._over(entry.seconds, OURS)
                entry.ratio_same = self._over(entry.seconds, PRECISIONS[entry.precision])

    def _over(self, seconds: float, name: str) -> float | None:
        entry = self.entry(name)
        return seconds / entry.seconds if entry is not None and entry.seconds else None

    def best(self, precision: Precision) -> str | None:
        """The fastest peer of that precision."""
        peers = [
            entry
            for entry in self.entries
            if entry.seconds is not None
            and entry.precision == precision
            and not (entry.name.startswith(OURS) or is_floor(entry.name))
        ]
        return min(peers, key=lambda entry: entry.seconds or 0.0).name if peers else None

    def to_dict(self) -> dict[str, Any]:
        floors = {entry.name: 1 / entry.ratio for entry in self.entries if is_floor(entry.name) and entry.ratio}
        best = {f"best_{precision}_peer": self.best(precision) for precision in PRECISIONS}
        return {**asdict(self), **best, "ours_over_floor": floors}


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the tables of a file's content."""
    for run in result["runs"]:
        for model in dict.fromkeys(row["model"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["model"] == model]
            _show_times(f"{model}, threads: {run['threads']}", [row for row in rows if row["rounds"]], console)
            for row in rows:
                _show_rest(row, console)
        if run["problem"] is not None:
            console.print(f"[red]threads {run['threads']}: {escape(run['problem'])}[/]")
        if run["not_run"]:
            console.print(f"threads {run['threads']}: no time left for {escape('; '.join(run['not_run']))}")
    show_facts(result, console)


def show_facts(result: dict[str, Any], console: Console) -> None:
    """Prints what the tables leave out: reasons, the machine, versions."""
    for line in sorted(set(_reasons(result))):
        console.print(escape(line), highlight=False)
    if result["dry"]:
        console.print("dry run: the times mean nothing")
    device = result["device"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    console.print(f"{device['cpu']}, {device['instruction_set']}, {device['cores']} cores; {versions}", highlight=False)
    console.print(f"commit {result['commit']}, {result['minutes']:.1f} minutes", highlight=False)


def _show_times(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """One row a workload, one column a contender."""
    if not rows:
        return
    names = dict.fromkeys(entry["name"] for row in rows for entry in row["entries"])
    title += ": medians, interleaved; x = its time over ours (over ours in its precision)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column()
    for name in names:
        table.add_column(HEADINGS.get(name, name).replace(" ", "\n"), justify="right")
    for row in rows:
        entries = {entry["name"]: entry for entry in row["entries"]}
        ours = entries.get(OURS, {}).get("seconds")
        cells = [_cell(entries.get(name)) for name in names if name != OURS]
        table.add_row(escape(row["name"].partition(": ")[2]), "-" if ours is None else duration(ours), *cells)
    console.print(table)


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["ratio"] is None:
        return "-"
    if is_floor(entry["name"]):
        return f"{1 / entry['ratio']:.2f}x"
    shown = f"{entry['ratio']:.2f}x"
    if entry["name"] not in PRECISIONS.values() and entry["precision"] != "fp32" and entry["ratio_same"] is not None:
        shown += f" ({entry['ratio_same']:.2f}x)"
    return shown + ("*" if entry["note"] else "")


def _show_rest(row: dict[str, Any], console: Console) -> None:
    if row["problem"] is not None:
        console.print(f"[red]{escape(row['name'])}: {escape(row['problem'].strip().splitlines()[-1])}[/]")
    if row["scores"]:
        scores = ", ".join(f"{name} {score:.4f}" for name, score in row["scores"].items())
        console.print(f"{escape(row['name'])}: {scores}", highlight=False)
    if row["cells"]:
        worst = min(row["cells"], key=lambda cell: float(cell["ratio"]))
        where = f"{worst['batch']} x {worst['length']}"
        text = f"{len(row['cells'])} cells, worst {worst['ratio']:.2f}x at batch x length {where}"
        console.print(f"{escape(row['name'])}: {text}", highlight=False)


def _reasons(result: dict[str, Any]) -> Iterable[str]:
    """What was not timed, and what a time needs said beside it."""
    for run in result["runs"]:
        for row in run["rows"]:
            if row["reason"] is not None:
                yield f"{row['name']}: {row['reason']}"
            for entry in row["entries"]:
                if entry["reason"] is not None:
                    yield f"{row['model']}, {entry['name']}: {entry['reason']}"
                if entry["note"] is not None:
                    yield f"* {row['name']}, {entry['name']}: {entry['note']}"

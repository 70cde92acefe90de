"""What a run finds: records, the file they are written to, and the table that is printed last."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..facts import commit, output, versions, write_json
from ..table import duration

PACKAGES = ("bert-fast", "torch", "triton", "transformers", "numpy")


@dataclass
class Peer:
    """
    Attributes:
        seconds: median; None where it did not run.
        ratio: its time over ours.
        error: relative Frobenius error against the reference, where the peer's result was compared.
        reason: why it did not run.
    """

    name: str
    seconds: float | None = None
    ratio: float | None = None
    error: float | None = None
    reason: str | None = None


@dataclass
class Goal:
    """One number of the target table.

    Attributes:
        what: the number.
        bound: what it should be; at most that where `is_upper`, else at least.
        found: None where nothing was found.
        is_met: None where nothing was found.
    """

    what: str
    bound: float
    is_upper: bool = False
    found: float | None = None
    is_met: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.is_met = None
        if self.found is not None:
            self.is_met = self.found <= self.bound if self.is_upper else self.found >= self.bound

    def __str__(self) -> str:
        found = "-" if self.found is None else f"{self.found:,.3g}"
        return f"{found} {self.what} ({'<=' if self.is_upper else '>='} {self.bound:g})"


@dataclass
class Floor:
    """The least time that the work can take.

    Attributes:
        what: "bytes" over the copy bandwidth, or "FLOPs" over the matrix product's rate.
        amount: of those.
        seconds: the floor.
        fraction: the floor over our time.
    """

    what: str
    amount: float
    seconds: float
    fraction: float | None = None


@dataclass
class Record:
    """One measurement.

    Attributes:
        row: of the target table.
        seconds: our median.
        host_seconds: how long the host is busy with one call of ours.
        error, error_bound: relative Frobenius error against a reference in float64 or float32, and what is granted.
        reason: why nothing was measured.
        traceback: of the exception that ended it.
    """

    row: str
    name: str
    seconds: float | None = None
    host_seconds: float | None = None
    rounds: int = 0
    peers: list[Peer] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    floor: Floor | None = None
    error: float | None = None
    error_bound: float | None = None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    traceback: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether the result is out of bounds; a NaN is."""
        return self.error is not None and self.error_bound is not None and not self.error <= self.error_bound

    @property
    def status(self) -> str:
        if self.traceback is not None:
            return "exception"
        if self.is_wrong:
            return "wrong"
        verdicts = [goal.is_met for goal in self.goals]
        if self.reason is not None or not any(verdict is not None for verdict in verdicts):
            return "not measured" if self.seconds is None or self.reason is not None else "measured"
        if False in verdicts:
            return "missed"
        return "met" if None not in verdicts else "partly"

    def peer(self, name: str) -> Peer | None:
        return next((peer for peer in self.peers if peer.name == name), None)

    def expect(
        self, what: str, bound: float, found: float | None, *, is_upper: bool = False, unless: str | None = None
    ) -> None:
        """Adds a goal; `unless` is a reason for which its number is not looked for."""
        self.goals.append(Goal(what, bound, is_upper, None if unless is not None else found))
        if unless is not None:
            self.notes.append(f"{what}: {unless}")

    def expect_faster(self, name: str, bound: float) -> None:
        """Adds the goal that the peer's time is at least `bound` times ours."""
        peer = self.peer(name)
        self.expect(f"x {name}", bound, None if peer is None else peer.ratio)

    def expect_fraction(self, bound: float) -> None:
        """Adds the goal for the fraction of the floor."""
        what = "of copy bandwidth" if self.floor is None or self.floor.what == "bytes" else "of the matrix rate"
        self.expect(what, bound, None if self.floor is None else self.floor.fraction)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "status": self.status}


@dataclass
class Report:
    """
    Attributes:
        device: its name.
        facts: versions, driver, commit.
        ceilings: measured, bytes and FLOPs a second.
        tests: what pytest said.
        not_run: rows of the target table for which no time was left.
    """

    device: str
    facts: dict[str, str | None]
    minutes: float = 0.0
    ceilings: dict[str, float] = field(default_factory=dict)
    tests: dict[str, Any] = field(default_factory=dict)
    cases: list[Record] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        """Whether something is wrong, as opposed to slow."""
        bad = any(record.status in ("exception", "wrong") for record in self.cases)
        return bad or not self.tests.get("passed", True)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cases": [record.to_dict() for record in self.cases]}

    def write(self, folder: Path) -> Path:
        """Writes FOLDER/<device>.json."""
        name = "-".join(self.device.lower().split())
        path = folder / f"{''.join(c for c in name if c.isalnum() or c in '-._')}.json"
        write_json(path, self.to_dict())
        return path

    def show(self, console: Console) -> None:
        with console.capture() as capture:
            console.print(_table(self.cases))
        # Blanks at the ends of lines would fill a log that is cut.
        console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
        if self.device == "dry run":
            console.print("dry run: times, and goals that rest on them, mean nothing")
        for record in self.cases:
            if record.traceback is not None:
                console.print(f"[red]{escape(record.name)}[/]: {escape(record.traceback.strip().splitlines()[-1])}")
        for row in self.not_run:
            console.print(f"not run, no time left: {escape(row)}")
        counts = dict.fromkeys(("met", "missed", "partly", "wrong", "exception", "measured", "not measured"), 0)
        for record in self.cases:
            counts[record.status] += 1
        console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
        if self.tests:
            console.print(f"tests: {escape(self.tests['summary'])}")
        ceilings = ", ".join(f"{name} {value:,.4g}" for name, value in self.ceilings.items())
        versions = ", ".join(f"{name} {value}" for name, value in self.facts.items() if value)
        console.print(f"{escape(self.device)}; {ceilings}; {versions}; {self.minutes:.1f} minutes")


COLOURS = {"met": "green", "missed": "yellow", "wrong": "red", "exception": "red"}


def _table(records: list[Record]) -> Table:
    """Narrow enough for the end of a log that is cut: everything else is in the file."""
    table = Table(
        title="medians, interleaved; x = peer's time over ours", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for name in ("case", "status", "bert_fast", "floor", "target", "peers"):
        table.add_column(name)
    for record in records:
        peers = [f"{peer.name} {peer.ratio:.2f}x" for peer in record.peers if peer.ratio is not None]
        fraction = "" if record.floor is None or record.floor.fraction is None else f"{record.floor.fraction:.0%}"
        colour = COLOURS.get(record.status, "default")
        table.add_row(
            escape(record.name),
            f"[{colour}]{record.status}[/]",
            "" if record.seconds is None else duration(record.seconds),
            fraction,
            escape("; ".join(map(str, record.goals))),
            escape(", ".join(peers)),
        )
    return table


# ---- where it ran ----------------------------------------------------------------------------------------------------


def facts() -> dict[str, str | None]:
    """Versions, driver and commit."""
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {**versions(PACKAGES), "driver": driver, "commit": commit()}

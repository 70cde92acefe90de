"""Prints the results of one run as a table of ratios: python -m benchmarks.table FILE.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(case, ours, peer, peer's median, peer's over ours) for each peer of each benchmark."""
    result = []
    for entry in results["benchmarks"]:
        module = Path(entry["fullname"].partition("::")[0]).stem.removeprefix("bench_")
        case = escape(f"{module}: {entry['name'].removeprefix('test_')}".replace("cpu-", ""))
        ours = entry["stats"]["median"]
        peers = entry["extra_info"].get("peers", {})
        if not peers:
            result.append((case, duration(ours), "", "", ""))
        for name, median in peers.items():
            result.append((case, duration(ours), name, duration(median), f"{median / ours:.2f}x"))
    return result


def main(path: str) -> None:
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    machine = results["machine_info"]
    table = Table(title="medians, interleaved; ratio = peer's time over ours", title_justify="left")
    for name in ("case", "bert_fast", "peer", "peer's", "ratio"):
        table.add_column(name, justify="left" if name in ("case", "peer") else "right")
    for row in rows(results):
        table.add_row(*row)
    console = Console(width=130)
    console.print(table)
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    console.print(f"{machine['device']}, {machine['instruction_set']}, {machine['threads']} threads; {versions}")


if __name__ == "__main__":
    main(sys.argv[1])

"""What a result says of where it was made: versions, commit, processor; no name of a host, no path."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Of a processor's flags, those that decide which kernels a library takes.
FLAGS = ("sse4", "avx", "amx", "fma", "f16c", "asimd", "sve", "i8mm", "bf16")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """package -> version; None where it is not installed."""
    return {package: _version(package) for package in packages}


def output(*command: str) -> str | None:
    """The first line that the program prints; None where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def commit() -> str | None:
    found = output("git", "rev-parse", "--short=12", "HEAD")
    if found is not None and output("git", "status", "--porcelain", "--untracked-files=no"):
        found += " and changes"
    return found


def processor() -> dict[str, Any]:
    """Model name, cores and flags; what Linux says of the first core, and little elsewhere."""
    found = {}
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text(encoding="utf-8").partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            found[name.strip()] = value.strip()
    flags = (found.get("flags") or found.get("Features") or "").split()
    return {
        "cpu": found.get("model name") or platform.processor() or platform.machine(),
        "family": found.get("cpu family"),
        "cores": os.cpu_count(),
        "flags": sorted(flag for flag in flags if flag.startswith(FLAGS)),
    }


def heading(packages: Iterable[str], is_dry: bool) -> dict[str, Any]:
    """What stands above the runs of a result; minutes and runs are still to come."""
    return {
        "device": processor(),
        "versions": versions(packages),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry": is_dry,
        "minutes": 0.0,
        "runs": [],
    }


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is whole at every moment: the run may be ended from outside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _finite(x: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not abs(x) < float("inf") else x

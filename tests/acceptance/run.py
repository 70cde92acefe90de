"""Runs transformers' own tests of models twice, on its models as they are and swapped: what passes must go on passing.

The tests come from the source distribution of the transformers that is installed, and stay in build/acceptance.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "transformers_tests"
START = "test_modeling_common"
MINUTES = 20  # for one family, stock or swapped


# ---- transformers' tests ---------------------------------------------------------------------------------------------


class Unavailable(Exception):  # noqa: N818
    """The source distribution cannot be had; the argument says why."""


def lay_out(build: Path) -> Path:
    """The folder that holds transformers' tests as a package, made if it is not there yet."""
    name = f"transformers-{version('transformers')}"
    folder = build / name
    if not folder.is_dir():
        archive = build / f"{name}.tar.gz"
        if not archive.is_file():
            download(build)
        unfinished = build / f"{name}.{os.getpid()}"
        extract(archive, unfinished / PACKAGE)
        add_stubs(unfinished / PACKAGE, START, set())
        for stub in (unfinished / PACKAGE).rglob("*.py"):
            (stub.parent / "__init__.py").touch()
        unfinished.rename(folder)
    return folder


def download(build: Path) -> None:
    """The sdist, not built; pip asks its build backend for metadata, which takes seconds."""
    build.mkdir(parents=True, exist_ok=True)
    wanted = f"transformers=={version('transformers')}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", "transformers"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(build), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        raise Unavailable(f"the source distribution of {wanted} cannot be downloaded: {lines[-1]}")


def extract(archive: Path, package: Path) -> None:
    """The Python files of the archive's tests."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, *parts = PurePosixPath(member.name).parts
            if member.isfile() and parts[:1] == ["tests"] and ".." not in parts and member.name.endswith(".py"):
                content: Any = tar.extractfile(member)
                target = package.joinpath(*parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())


def add_stubs(package: Path, module: str, seen: set[str]) -> None:
    """Empty classes for what the module imports of its own package that no sdist holds, and so on in what it does.

    Args:
        package: the folder of the package.
        module: name within it, with dots.
        seen: modules that have been looked at.
    """
    seen.add(module)
    path = package.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level or node.module is None:
            continue
        name = ".".join([*module.split(".")[: -node.level], node.module])
        target = package.joinpath(*name.split(".")).with_suffix(".py")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("\n\n".join(f"class {alias.name}:\n    pass\n" for alias in node.names))
        elif name not in seen:
            add_stubs(package, name, seen)


# ---- the runs --------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """
    Attributes:
        failure: what went wrong; empty: nothing.
        skips: how many of its subtests were skipped, or the test itself.
    """

    failure: str
    skips: int

    @property
    def is_passed(self) -> bool:
        return not self.failure and not self.skips

    def is_worse(self, other: Verdict) -> bool:
        """Whether more went wrong, or less was tested, where nothing went wrong with the other."""
        return not other.failure and (bool(self.failure) or self.skips > other.skips)


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        verdicts: by test.
        calls: path -> encoder calls that took it.
        seconds: that it took.
        ending: what is the matter with the process itself; empty: nothing.
    """

    verdicts: dict[str, Verdict]
    calls: Counter[str]
    seconds: float
    ending: str

    @property
    def passed(self) -> int:
        return sum(verdict.is_passed for verdict in self.verdicts.values())


def run(test_class: str, package: Path, build: Path, is_swapped: bool) -> Run:
    """One family's tests in a process of their own."""
    stem = build / f"{test_class}-{'swapped' if is_swapped else 'stock'}"
    report, calls, log = (stem.with_suffix(suffix) for suffix in (".xml", ".json", ".log"))
    for path in (report, calls):
        path.unlink(missing_ok=True)
    paths = [str(package), str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    variables.setdefault("OMP_NUM_THREADS", "1")
    variables.pop("BERT_FAST", None)
    if is_swapped:
        variables["BERT_FAST_ACCEPTANCE_CALLS"] = str(calls)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", f"families.py::{test_class}"]
    begun = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=HERE, env=variables, stdout=file, stderr=file, timeout=60 * MINUTES, check=False
            ).returncode
            ending = "" if code in (0, 1) else f"pytest ended with {code}; see {log}"
        except subprocess.TimeoutExpired:
            ending = f"pytest took more than {MINUTES} minutes; see {log}"
    verdicts = verdicts_of(report) if report.is_file() else {}
    counted = Counter(json.loads(calls.read_text()) if calls.is_file() else {})
    return Run(verdicts, counted, time.monotonic() - begun, ending)


def verdicts_of(report: Path) -> dict[str, Verdict]:
    """What a JUnit report says of each test."""
    verdicts: dict[str, Verdict] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test = case.attrib["name"]
        failure, skips = verdicts.get(test, ("", 0))
        for child in case:
            if child.tag in ("failure", "error"):
                failure = failure or (child.get("message") or child.tag).strip().partition("\n")[0]
            elif child.tag == "skipped":
                skips += 1
        verdicts[test] = Verdict(failure, skips)
    return verdicts


# ---- the verdict -----------------------------------------------------------------------------------------------------


NOT_RUN = Verdict("not run", 0)

COLUMNS = (
    "collected",
    "stock passed",
    "stock failed",
    "swapped passed",
    "new failures",
    "fast calls",
    "original calls",
    "time",
)


def new_failures(stock: Run, swapped: Run) -> dict[str, str]:
    """Test -> what is the matter with swapped models, and is not with stock ones."""
    found = {}
    for test, before in stock.verdicts.items():
        after = swapped.verdicts.get(test, NOT_RUN)
        if after.is_worse(before):
            found[test] = after.failure or f"{after.skips} skipped instead of {before.skips}"
    return found


def complaints(stock: Run, swapped: Run | None) -> Iterator[str]:
    """What must not be."""
    for name, each in (("stock", stock), ("swapped", swapped)):
        if each is not None and each.ending:
            yield f"{name}: {each.ending}"
    if not stock.passed:
        yield "no test passed with stock models, so that nothing was compared"
    if swapped is None:
        return
    if not swapped.calls["fast"]:
        yield "no call took the fast path"
    for test, matter in new_failures(stock, swapped).items():
        yield f"new failure: {test}: {matter}"


def compare(name: str, test_class: str, is_known: bool, package: Path, build: Path) -> bool:
    """Runs a family and prints its row and what must not be; whether there is nothing of that."""
    stock = run(test_class, package, build, is_swapped=False)
    swapped = run(test_class, package, build, is_swapped=True) if is_known else None
    found = list(complaints(stock, swapped))
    failures = {test: verdict.failure for test, verdict in stock.verdicts.items() if verdict.failure}
    seconds = stock.seconds + (0 if swapped is None else swapped.seconds)
    cells: list[object] = ["not known", "-", "-", "-"]
    if swapped is not None:
        fast = swapped.calls["fast"]
        cells = [swapped.passed, len(new_failures(stock, swapped)), fast, swapped.calls.total() - fast]
    print_row(name, len(stock.verdicts), stock.passed, len(failures), *cells, f"{seconds:.0f} s")
    for complaint in found:
        print(f"    {complaint}")
    for test, failure in failures.items():
        print(f"    fails with stock models: {test}: {failure}")
    for path, number in (Counter() if swapped is None else swapped.calls).most_common():
        if path != "fast":
            print(f"    original path, {number} calls: {path}")
    return not found


def print_row(*cells: object) -> None:
    name, *others = cells
    print(f"{name:12}", *(f"{cell!s:>15}" for cell in others), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="all of them where none is given")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "acceptance", help="where tests and results lie")
    options = parser.parse_args(arguments)
    build = options.build.resolve()
    try:
        package = lay_out(build)
    except Unavailable as reason:
        print(f"skipped: {reason}")
        return 0
    sys.path[:0] = [str(package), str(ROOT)]
    from families import FAMILIES, Tester
    from swapping import is_known

    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"unknown families {sorted(unknown)}; known are {', '.join(FAMILIES)}")
    print_row(
        "",
        "collected",
        "stock passed",
        "stock failed",
        "passed swapped",
        "new failures",
        "fast calls",
        "original calls",
        "time",
    )
    is_good = True
    for name in options.families or FAMILIES:
        family = FAMILIES[name]
        encoder, *_ = family.classes()
        known = is_known(encoder(Tester(family).get_config()))
        is_good &= compare(name, family.test_class, known, package, build)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the commands' options share: kinds of paths, devices, and errors in one line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import click
import torch

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
PATH = click.Path(exists=True, path_type=Path)


def need(extra: str, *packages: str) -> None:
    """One clear line and exit status 2 where a package of an extra is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise click.UsageError(f"{' and '.join(missing)} missing; pip install 'bert-fast[{extra}]'")


def check_out(name: str, out: Path | None, inputs: Iterable[Path | None], suffixes: Sequence[str] = ()) -> None:
    """Before the work: what is to be written can be, and is nothing that is read.

    Args:
        name: of the option.
        out: its value.
        inputs: files and folders that are read.
        suffixes: that are allowed; none: all.

    Raises:
        ValueError: it cannot.
    """
    if out is None:
        return
    if suffixes and out.suffix.lower() not in suffixes:
        raise ValueError(f"{name} is {out}; its suffix must be {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise ValueError(f"{name} is {out}; the folder {out.parent} does not exist")
    if out.resolve() in {file.resolve() for file in inputs if file is not None}:
        raise ValueError(f"{name} is {out}, which is read; name another file")


@contextmanager
def one_line() -> Iterator[None]:
    """What bad files, values and folders raise becomes one clear line, of one process a machine, and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        raise click.UsageError(str(error)) from None


def device_named(name: str) -> torch.device:
    """
    Raises:
        click.BadParameter: torch knows no such device.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        raise click.BadParameter(f"{name!r} is no device; cpu or cuda is meant") from None


def present_device(
    _context: click.Context, _parameter: click.Parameter | None, name: str | None
) -> torch.device | None:
    """One that this machine has; None: a GPU if there is one."""
    if name is None:
        return None
    device = device_named(name)
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} is not served; cpu or cuda is meant")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("this machine has no CUDA device; cpu works everywhere")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(f"{name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def device_of_any(_context: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    """One that perhaps another machine has; None: a GPU if there is one."""
    return name if name is None else str(device_named(name))


FOUND = "cpu, cuda or cuda:N.  [default: a GPU if there is one]"

device_option = click.option(
    "--device", default="cpu", show_default=True, callback=present_device, help="cpu, cuda or cuda:N."
)
found_device_option = click.option("--device", callback=present_device, help=FOUND)
device_of_any_option = click.option("--device", callback=device_of_any, help=FOUND)

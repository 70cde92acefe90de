"""The command bert-fast. Its libraries are extras: without them it says so in one line and exits with 2."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Entry point of the command."""
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        print(f"bert-fast: {' and '.join(missing)} missing; pip install 'bert-fast[cli]'", file=sys.stderr)
        sys.exit(2)
    import click

    from .app import app

    try:
        sys.exit(app(prog_name="bert-fast", standalone_mode=False))
    except click.ClickException as error:
        print(f"bert-fast: {error.format_message()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)


if __name__ == "__main__":
    main()

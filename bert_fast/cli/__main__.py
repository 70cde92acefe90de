"""python -m bert_fast.cli, which torchrun and accelerate launch take after their -m."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()

"""Every GPU target, each measured against its peers in one run: python -m benchmarks.gpu --out FOLDER."""

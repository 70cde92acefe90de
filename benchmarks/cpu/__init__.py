"""Encoders on a CPU, each measured against its peers in one run: python -m benchmarks.cpu --out FILE.json"""

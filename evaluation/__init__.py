"""Benchmarks on public and synthetic data, run from a checkout; nothing here is in the wheel."""

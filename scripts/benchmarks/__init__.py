"""What scripts/benchmark.py compares, one file each, and how it measures."""

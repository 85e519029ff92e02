"""`python -m benchmarks serving`: mdn-serve beside the bare loop, and under load."""

"""Benchmarks; each checks that its subject is right before it times it."""

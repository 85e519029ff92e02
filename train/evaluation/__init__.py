"""What a run measures on held-out text, and its sample."""

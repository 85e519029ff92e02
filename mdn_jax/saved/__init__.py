"""Models in checkpoints: read, checked by their digests, and written."""

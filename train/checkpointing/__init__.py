"""Checkpoints of a run, its directory, and what may change when it resumes."""

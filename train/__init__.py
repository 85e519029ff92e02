"""Training of Momentum DeltaNet language models: `python -m train`, from a clone."""

PROGRAM = "python -m train"
"""Its name in messages."""

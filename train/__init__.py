"""Training of Momentum DeltaNet language models: the `mdn-train` command."""

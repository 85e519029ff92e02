"""What a checkpoint is used for: `mdn-generate`, `mdn-eval`, `mdn-convert`."""

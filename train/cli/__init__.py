"""Commands beside `mdn-train`: `mdn-tokenize` before it, the others for its checkpoints."""

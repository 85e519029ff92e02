"""The commands of the wheel: mdn-generate, mdn-eval, mdn-convert, mdn-inspect."""

"""From files or a stream to batches: documents, their split, tokens, fixed-length rows."""

from train.data.packing import Batch

__all__ = ["Batch"]

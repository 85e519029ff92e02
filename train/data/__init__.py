"""From files to batches: documents, their split, fixed-length rows."""

from train.data.corpus import Corpus, load_corpus
from train.data.packing import Batch, PackedRows, held_out_batches, unigram_entropy

__all__ = [
    "Batch",
    "Corpus",
    "PackedRows",
    "held_out_batches",
    "load_corpus",
    "unigram_entropy",
]

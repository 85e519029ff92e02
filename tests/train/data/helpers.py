"""Documents in every form that training reads, and a tokenizer of merged bytes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.text.helpers import TEXTS, write_jsonl, write_parquet
from train.config_sections import DataConfig
from train.data.tokenizing import write_shards


def data_of(kind: str, directory: Path, texts: Sequence[str] = TEXTS, **changes) -> DataConfig:
    """The same documents as files of text, JSONL, Parquet, shards of tokens, or a stream."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        for i, text in enumerate(texts):
            (directory / f"{i:03}.txt").write_text(text)
        return DataConfig(files=(str(directory / "*.txt"),), **changes)
    if kind == "jsonl":
        return DataConfig(files=(str(write_jsonl(directory / "a.jsonl", texts)),), **changes)
    if kind in ("parquet", "stream"):
        for i in range(3):
            name = f"train-{i:05}-of-00003.parquet"
            write_parquet(directory / "data" / name, texts[i * 20 : i * 20 + 20])
        if kind == "parquet":
            return DataConfig(files=(str(directory),), **changes)
        return DataConfig(dataset=str(directory), shuffle_buffer=16, **changes)
    write_jsonl(directory / "a.jsonl", texts)
    source = DataConfig(
        files=(str(directory / "a.jsonl"),), tokenizer=changes.pop("tokenizer", None)
    )
    write_shards(source, directory / "shards", shard_bytes=800, processes=1)
    return DataConfig(files=(str(directory / "shards"),), **changes)


def texts_of(batches):
    """The documents in batches of bytes, in any order; those that a row cuts are in parts."""
    found = []
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in np.unique(segments):
                found.append(bytes(t for t in tokens[segments == segment].tolist() if t < 256))
    return found

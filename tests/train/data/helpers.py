"""Documents in every form that training reads, and a tokenizer of merged bytes."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import ByteLevelBPETokenizer

from train.config_sections import DataConfig
from train.data.tokenizing import write_shards

TEXTS = [
    f"{i}: " + " ".join(f"word{random.Random(i * 99 + j).randrange(50)}" for j in range(i % 9 + 1))
    for i in range(60)
]


def write_jsonl(path, texts=None):
    texts = TEXTS if texts is None else texts
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path, texts=TEXTS, group=7, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": texts, "id": list(range(len(texts)))} | columns)
    pq.write_table(table, path, row_group_size=group)
    return path


def write_bpe(directory):
    """GPT-2's two files, of a vocabulary of 300."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    directory.mkdir(exist_ok=True)
    bpe.save_model(str(directory))
    return directory


def data_of(kind: str, directory: Path, **changes) -> DataConfig:
    """The same documents as files of text, JSONL, Parquet, shards of tokens, or a stream."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        for i, text in enumerate(TEXTS):
            (directory / f"{i:03}.txt").write_text(text)
        return DataConfig(files=(str(directory / "*.txt"),), **changes)
    if kind == "jsonl":
        return DataConfig(files=(str(write_jsonl(directory / "a.jsonl")),), **changes)
    if kind in ("parquet", "stream"):
        for i in range(3):
            name = f"train-{i:05}-of-00003.parquet"
            write_parquet(directory / "data" / name, TEXTS[i * 20 : i * 20 + 20])
        if kind == "parquet":
            return DataConfig(files=(str(directory),), **changes)
        return DataConfig(dataset=str(directory), shuffle_buffer=16, **changes)
    write_jsonl(directory / "a.jsonl")
    source = DataConfig(
        files=(str(directory / "a.jsonl"),), tokenizer=changes.pop("tokenizer", None)
    )
    write_shards(source, directory / "shards", shard_bytes=800, processes=1)
    return DataConfig(files=(str(directory / "shards"),), **changes)


def write_hostile(directory: Path) -> list[Path]:
    """Files that nobody can read, by what is wrong with them."""
    files = {
        "zip.txt": b"PK\x03\x04 and more",
        "npz.npz": b"PK\x03\x04 and more",
        "zero.bin": b"abc\0def",
        "utf16.txt": "text".encode("utf-16"),
        "empty.txt": b"",
        "cut.jsonl": b'{"text": "a"}\n{"text": "cut',
        "deep.jsonl": b'{"text": "a"}\n' + b"[" * 99_999,
        "null.jsonl": b'{"text": null}',
        "number.jsonl": b'{"text": 7}',
        "half.jsonl": b'{"text": "\\udc12"}',
        "other.jsonl": b'{"body": "a"}',
        "text.parquet": b"no Parquet",
        "text.gz": b"not compressed",
    }
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    write_parquet(directory / "null.parquet", ["a", None])
    (directory / "gone.txt").symlink_to("nowhere")
    os.mkfifo(directory / "pipe.jsonl")
    return [*sorted(directory.iterdir()), directory / "none*"]


def texts_of(batches):
    """The documents in batches of bytes, in any order; those that a row cuts are in parts."""
    found = []
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in np.unique(segments):
                found.append(bytes(t for t in tokens[segments == segment].tolist() if t < 256))
    return found

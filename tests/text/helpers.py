"""Documents in every form that is read, and a tokenizer of merged bytes."""

import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import ByteLevelBPETokenizer

TEXTS = [
    f"{i}: " + " ".join(f"word{random.Random(i * 99 + j).randrange(50)}" for j in range(i % 9 + 1))
    for i in range(60)
]


def write_jsonl(path, texts=TEXTS):
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

"""The tokenizer of a corpus, and its documents as shards of tokens."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks.corpus.documents import TEST, TRAIN
from mdn_jax.new_file import write_text
from mdn_jax.text.corpus import digest_of
from mdn_jax.text.vocabulary import END_OF_TEXT, TOKENIZER_FILE

SHARDS = "shards"
_BLOCK = 1 << 24


class Shards(NamedTuple):
    """Size of a directory of shards.

    Attributes:
      directory: under the output.
      documents: their number.
      tokens: their number, with one that opens every document.
      bytes: of the files.
      compressed: bytes of the same after gzip.
    """

    directory: str
    documents: int
    tokens: int
    bytes: int
    compressed: int


def train_tokenizer(
    domains: Sequence[str], output: Path, *, vocabulary: int, sample_mb: float
) -> Path:
    """Trains a byte-level BPE on a sample of the training documents, unless there is one.

    Digits are tokens of their own. `<|endoftext|>`, the last token, opens documents.

    Args:
      domains: their names; each gives the same share of its documents.
      output: directory of the corpus; the tokenizer goes beside the shards.
      vocabulary: number of tokens.
      sample_mb: MB of text to train on, about.

    Returns:
      The path of the `tokenizer.json`.
    """
    path = output / TOKENIZER_FILE
    if path.exists():
        return path
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_sample(domains, output, sample_mb), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    write_text(path, tokenizer.to_str(pretty=True))
    return path


def _sample(domains: Sequence[str], output: Path, most_mb: float) -> Iterator[str]:
    """Documents by the middle of their digests: both ends decide other things."""
    files = [output / TRAIN / f"{domain}.jsonl" for domain in domains]
    fraction = most_mb * 1e6 / max(1, sum(path.stat().st_size for path in files))
    for path in files:
        with path.open() as file:
            for line in file:
                text = json.loads(line)["text"]
                if int.from_bytes(digest_of(text.encode())[8:16]) < fraction * 2**64:
                    yield text


def write_all_shards(domains: Sequence[str], output: Path, *, processes: int) -> list[Shards]:
    """Writes the shards of the training documents, and of the test documents of each domain.

    Args:
      domains: with documents.
      output: directory of the corpus.
      processes: that work at the same time.

    Returns:
      Their sizes; the training's first.
    """
    from train.config_sections import DataConfig
    from train.data.tokenizing import write_shards

    jobs = [(Path(SHARDS) / TRAIN, [output / TRAIN / f"{domain}.jsonl" for domain in domains])]
    for domain in domains:
        file = output / TEST / f"{domain}.jsonl"
        if file.stat().st_size:
            jobs.append((Path(SHARDS) / TEST / domain, [file]))
    sizes = []
    for directory, files in jobs:
        config = DataConfig(files=tuple(map(str, files)), tokenizer=str(output / TOKENIZER_FILE))
        headers, _ = write_shards(
            config, output / directory, shard_bytes=64_000_000, processes=processes
        )
        paths = sorted((output / directory).glob("*.tokens"))
        sizes.append(
            Shards(
                directory=str(directory),
                documents=sum(header.documents for header in headers),
                tokens=sum(header.tokens for header in headers),
                bytes=sum(path.stat().st_size for path in paths),
                compressed=sum(map(_compressed, paths)),
            )
        )
    return sizes


class _Count:
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: Any) -> int:
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def _compressed(path: Path) -> int:
    """Bytes of a file after gzip."""
    count: Any = _Count()
    opened: IO[bytes] = path.open("rb")
    with opened as file, gzip.GzipFile(fileobj=count, mode="wb", compresslevel=6, mtime=0) as out:
        while block := file.read(_BLOCK):
            out.write(block)
    size: int = count.bytes
    return size

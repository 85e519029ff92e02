"""What a configuration names, found and opened: one source of documents, or several."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mdn_jax.errors import RunError
from mdn_jax.text.corpus import load_corpus
from mdn_jax.text.files import Format, find_files, shown
from mdn_jax.text.tokenizer import (
    BYTES,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    make_tokenizer,
)
from train.config_sections import DataConfig
from train.data.documents import Documents, tokenize
from train.data.examples import fields_of, make_encoder
from train.data.shards import open_shards, read_header
from train.parallel.distributed import say

_UNNAMED = """data: expected documents to train on, got none; add one of these, for example:
    --data.files 'texts/**/*.txt'    (text, JSONL, Parquet, directories of them, shards)
    --data.dataset NAME              (of Hugging Face, as a stream)"""


class Found(NamedTuple):
    """A source of documents, found and not read yet.

    Attributes:
      name: of the source in a mixture; "" where there is one.
      weight: its share of the rows, beside those of the others.
      config: of this source alone.
      files: from `find_files`; none of a stream.
    """

    name: str
    weight: float
    config: DataConfig
    files: list[tuple[Path, Format]]

    @property
    def shards(self) -> list[Path]:
        """The files where they are shards of tokens; else none."""
        return [path for path, format in self.files if format == "tokens"]


class Source(NamedTuple):
    """All that a configuration names.

    Attributes:
      parts: one, or those of a mixture.
      tokenizer: of the documents of all.
    """

    parts: list[Found]
    tokenizer: Tokenizer


def find_source(config: DataConfig) -> Source:
    """The files that a configuration names, and its tokenizer: that of shards is beside them.

    Raises:
      RunError: no names, names that match no file, or a tokenizer that cannot be used.
    """
    parts = [_find(name, weight, each) for name, weight, each in _configs(config)]
    choice = config.tokenizer
    for path in [path for part in parts for path in part.shards[:1]]:
        header = read_header(path)
        if choice is None and header.tokenizer != BYTES:
            choice = str(path.parent / TOKENIZER_FILE)
    return Source(parts, make_tokenizer(choice, config.start_token))


def _configs(config: DataConfig) -> list[tuple[str, float, DataConfig]]:
    """Name, weight and configuration of every source."""
    if not config.sources:
        if not (config.files or config.dataset is not None or config.standard_library):
            raise RunError(_UNNAMED)
        return [("", 1.0, config)]
    whole = dataclasses.replace(config, sources=(), standard_library=False)
    found = []
    for source in config.sources:
        own = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
        name, weight = own.pop("name") or source.title, own.pop("weight")
        stated = {key: value for key, value in own.items() if value is not None}
        found.append((name, weight, dataclasses.replace(whole, **stated)))
    twice = [name for name, count in Counter(name for name, _, _ in found).items() if count > 1]
    if twice:
        raise RunError(f"data.sources: expected a name of its own for each, got {twice[0]!r} twice")
    return found


def _find(name: str, weight: float, config: DataConfig) -> Found:
    with_name = f"{name}: " if name else ""
    try:
        return Found(name, weight, config, [] if config.dataset is not None else find_files(config))
    except RunError as error:
        raise RunError(f"{with_name}{error}") from None


def open_documents(found: Found, tokenizer: Tokenizer) -> tuple[Documents, Documents, str]:
    """The documents of files: those to train on, those held out, and the digest of all of them.

    Raises:
      RunError: documents that cannot be used, or shards of another tokenizer.
    """
    config = found.config
    fields = fields_of(config)
    if found.shards and fields.are_parts:
        raise RunError(
            "data.files: expected JSONL or Parquet with data.prompt or data.messages, got shards, "
            "which do not say what is learned"
        )
    if found.shards:
        return open_shards(
            found.shards,
            tokenizer,
            held_out_fraction=config.held_out_fraction,
            verify=config.verify,
        )
    empty: Counter[Path] = Counter()
    utf8 = not isinstance(tokenizer, ByteTokenizer)
    corpus = load_corpus(config, files=found.files, utf8=utf8, empty=empty)
    if empty:
        (path, _), *others = empty.most_common()
        more = f" and {len(others)} other file(s)" if others else ""
        say(
            f"data.field: {empty.total()} record(s) with nothing in {fields.names[-1]!r} to learn "
            f"are left out, in {shown(path)}{more}"
        )
    odd = 0 if utf8 else sum(not _is_utf8(x) for x in (*corpus.train, *corpus.held_out))
    if odd:
        say(
            f"data.files: {odd} document(s) are not UTF-8 text, or binary; a model of bytes learns "
            "them as they are"
        )
    encoder = make_encoder(config, tokenizer) if fields.are_parts else None
    train, held_out = (
        tokenize(texts, tokenizer, encoder) for texts in (corpus.train, corpus.held_out)
    )
    return train, held_out, corpus.fingerprint


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True

"""The files that commands read text from, by the readers of training."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mdn_jax.cli.common import CheckpointConfig, open_checkpoint
from mdn_jax.errors import RunError
from mdn_jax.models import MDNForCausalLM
from mdn_jax.text.corpus import load_corpus, read_texts
from mdn_jax.text.files import TextFiles
from mdn_jax.text.text import ByteText, Text


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Which documents."""

    files: tuple[str, ...]
    """Files or globs ('**' crosses directories): text, JSONL or Parquet, by their suffix; or
    directories of these, or of Parquet files as Hugging Face lays them out."""

    format: Literal["text", "jsonl", "parquet"] | None = None
    """What the files are; None: their suffix says so."""

    field: str = "text"
    """Field of JSONL or column of Parquet that holds the text."""

    split: str = "train"
    """Split of a directory of Parquet files."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(FilesConfig, CheckpointConfig):
    """A checkpoint and the documents to try it on."""


def open_documents(config: TextConfig) -> tuple[MDNForCausalLM, Text, list[str]]:
    """The model, its tokens, and the documents; without files those that training holds out.

    Bytes that are no UTF-8 are surrogates (PEP 383), which only a model of bytes can have.

    Raises:
      RunError: files or a checkpoint that cannot be used, files without text, or text that is not
        UTF-8 for another tokenizer than bytes.
    """
    data = TextFiles(
        files=config.files, format=config.format, field=config.field, split=config.split
    )
    texts = _read(data)  # before the model: it takes longer
    model, text = open_checkpoint(config)
    if not isinstance(text, ByteText) and any(map(_is_not_utf8, texts)):
        _read(data, utf8=True)  # which names the file
    return model, text, texts


def _read(data: TextFiles, *, utf8: bool = False) -> list[str]:
    def read() -> Iterable[bytes]:
        return read_texts(data, utf8=utf8) if data.files else load_corpus(data).held_out

    try:
        return [document.decode(errors="surrogateescape") for document in read()]
    except RunError as error:
        message = re.sub(r"(^|: )data\.(?=\w+: )", r"\1", str(error))  # flags have no prefix here
        raise RunError(message) from None


def _is_not_utf8(text: str) -> bool:
    return not text.isascii() and re.search("[\udc80-\udcff]", text) is not None

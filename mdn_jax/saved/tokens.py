"""The tokens of a checkpoint: its tokenizer's file, or bytes."""

import json
from pathlib import Path
from typing import Literal

from mdn_jax.errors import RunError
from mdn_jax.saved.digest import file_digest
from mdn_jax.saved.model import Saved
from mdn_jax.text.text import ByteText, FileText, Text
from mdn_jax.text.tokenizer import VOCAB_SIZE
from mdn_jax.text.vocabulary import TOKENIZER_FILE


def tokenizer_beside(directory: Path, saved: Saved) -> Path | None:
    """The tokenizer's file of a run, a conversion or a folder, or the folder of GPT-2's two files.

    Raises:
      RunError: not the one that the checkpoint was written with.
    """
    path = directory / TOKENIZER_FILE
    if saved.tokenizer is not None:
        got = file_digest(path)
        if got != saved.tokenizer:
            raise RunError(
                f"tokenizer: expected the {TOKENIZER_FILE} of the checkpoint in {path} (SHA-256 "
                f"{saved.tokenizer[:12]}), got {'none' if got is None else f'another ({got[:12]})'}"
            )
    if path.exists():
        return path
    # GPT-2's two files
    return directory if saved.folder and (directory / "merges.txt").exists() else None


def load_text(choice: Path | Literal["bytes"] | None, directory: Path, saved: Saved) -> Text:
    """The tokens of a checkpoint.

    Args:
      choice: a `tokenizer.json`, "bytes", or None: the file in `directory` if there is one, else
        bytes.
      directory: of the checkpoint.
      saved: the checkpoint.

    Raises:
      RunError: a file that cannot be used, or of another vocabulary than the checkpoint's, or no
        way to tell what the tokens are.
    """
    if choice is None:
        choice = tokenizer_beside(directory, saved)
    size = saved.model.vocab_size
    if choice is not None and str(choice) != "bytes":
        end = json.loads(dict(saved.model.extras).get("eos_token_id", "null"))
        if end is not None and not 0 <= end < size:
            raise RunError(f"eos_token_id: expected an id below {size}, got {end} in {directory}")
        text = FileText(Path(choice).expanduser(), end_token=end)
        if text.vocab_size > size:
            raise RunError(
                f"tokenizer: expected ids below the {size} of the vocabulary of {directory}, got "
                f"ids up to {text.vocab_size - 1} in {choice}"
            )
        return text
    if size < VOCAB_SIZE:
        raise RunError(
            f"tokenizer: expected a tokenizer.json, as the vocabulary of {directory} has {size} "
            f"tokens and that of bytes {VOCAB_SIZE}, got none"
        )
    if choice is None and saved.dtype is None and size != VOCAB_SIZE:
        raise RunError(
            f"tokenizer: expected a tokenizer.json for the {size} tokens of the converted model "
            f'in {directory} (or "bytes"), got none'
        )
    return ByteText()

"""Tokenizers of the tokenizers library: read, and asked for what they do not say of themselves."""

import copy
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from mdn_jax.errors import RunError
from mdn_jax.extras import install

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"

_GPT2_FILES = ("vocab.json", "merges.txt")
_END_TOKENS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[EOS]")


class Vocabulary:
    """A tokenizer that neither truncates nor pads.

    Special tokens are those that the file calls so, those that the tokenizer itself adds to a text
    and those with the usual names of an end. A text that spells one is text: no document can forge
    a control token.

    Attributes:
      library: the `tokenizers.Tokenizer`.
      ids: of every token, by its name.
      size: the highest id and 1; there may be ids without a token below it.
      opening: ids that the tokenizer puts before a text.
      closing: ids that it puts behind a text.
      special: the special tokens (`tokenizers.AddedToken`) by their ids.
    """

    def __init__(self, path: Path) -> None:
        """Reads a tokenizer.

        Args:
          path: a `tokenizer.json`, or a directory with one, or with GPT-2's two files.

        Raises:
          RunError: no such files, files that cannot be used, or no library to read them.
        """
        self.library = _read(path)
        self.library.encode_special_tokens = True
        self.ids: dict[str, int] = self.library.get_vocab(with_added_tokens=True)
        if not self.ids:
            raise RunError(f"tokenizer: expected a vocabulary in {path}, got none")
        self.size = max(self.ids.values()) + 1
        self.opening, self.closing = self._template(path)
        self._reserve([*self.opening, *self.closing, *self.end_tokens])

    def open_with(self, token: str) -> None:
        """Makes a token of the vocabulary open every text, unless it does."""
        from tokenizers.processors import Sequence as InSequence
        from tokenizers.processors import TemplateProcessing

        number = self.ids[token]
        self._reserve([number])
        if self.opening[:1] == (number,):
            return
        opening = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])
        own = self.library.post_processor
        self.library.post_processor = opening if own is None else InSequence([own, opening])
        self.opening = (number, *self.opening)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text without what opens and closes it.

        Args:
          text: any.
          special: whether special tokens that it spells are those tokens; else they are text.

        Raises:
          RunError: a text with lone surrogates, as bytes that are no UTF-8 leave them.
        """
        library = self._marking if special and self._spells(text) else self.library
        try:
            text.encode()  # the library's own error is one of types
        except UnicodeEncodeError as error:
            raise not_text(error, "UTF-8 text for a tokenizer other than bytes") from None
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and ids without a token have none."""
        text: str = self.library.decode(ids)
        return text

    @cached_property
    def visible(self) -> frozenset[int]:
        """Ids of the tokens that can have a text."""
        return frozenset(self.ids.values()) - self.special.keys()

    @cached_property
    def bytes(self) -> frozenset[int]:
        """Ids of tokens that are one byte of a character which the vocabulary lacks (`<0xE4>`)."""
        ids = [self.library.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        falls_back = None not in ids and self.decode([ids[ord("A")]]) == "A"
        return frozenset(ids if falls_back else ())

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids after which nothing belongs to a text: what closes it, and the usual names."""
        named = [self.ids[name] for name in _END_TOKENS if name in self.ids]
        return tuple(dict.fromkeys([*self.closing[:1], *named]))

    @cached_property
    def word(self) -> list[int]:
        """A token that is a word, for text to stand behind; none where there is no such token."""
        for token in chain(self.encode("a")[-1:], range(self.size)):
            is_part = token in self.bytes or token not in self.visible
            if not is_part and self.decode([token]).strip().isalnum():
                return [token]
        return []

    @cached_property
    def _marking(self) -> Any:
        """The tokenizer that finds special tokens in a text."""
        library = copy.deepcopy(self.library)
        library.encode_special_tokens = False
        return library

    def _spells(self, text: str) -> bool:
        return any(token.normalized or token.content in text for token in self.special.values())

    def _template(self, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and behind a text; any that has tokens shows it."""
        for text in chain(("a", " a"), self.ids):
            body = self.library.encode(text, add_special_tokens=False).ids
            if body:
                break
        else:
            return tuple(self.library.encode("").ids), ()
        whole, size = self.library.encode(text).ids, len(body)
        for start in range(len(whole)):
            if whole[start : start + size] == body:
                return tuple(whole[:start]), tuple(whole[start + size :])
        raise RunError(f"tokenizer: expected one that adds to a text at its ends only, got {path}")

    def _reserve(self, ids: Iterable[int]) -> None:
        """Makes tokens special, and keeps the model from making special tokens of a text.

        A model whose own vocabulary has such a name (as a piece of Unigram, or as a word) finds it
        in a text by itself: there the text is cut after the name's first character.
        """
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Sequence as InSequence
        from tokenizers.pre_tokenizers import Split

        self.special = self._read_special()
        new = [self.library.id_to_token(i) for i in ids if i not in self.special]
        if new:
            self.library.add_special_tokens(new)
            self.special = self._read_special()
        found = [
            token.content
            for number, token in self.special.items()
            if len(token.content) > 1 and number in self.encode(token.content)
        ]
        if found:
            cut = "|".join(f"{re.escape(x[0])}(?={re.escape(x[1:])})" for x in sorted(found))
            own = self.library.pre_tokenizer
            split = Split(Regex(cut), "isolated")
            self.library.pre_tokenizer = split if own is None else InSequence([own, split])

    def _read_special(self) -> dict[int, Any]:
        added = self.library.get_added_tokens_decoder()
        return {number: token for number, token in added.items() if token.special}


def not_text(error: UnicodeEncodeError, expected: str) -> RunError:
    """The error of a text with lone surrogates, with what is around them."""
    around = error.object[max(0, error.start - 20) : error.start + 20]
    return RunError(f"text: expected {expected}, got lone surrogates in {around!r}")


def _read(path: Path) -> Any:
    try:
        from tokenizers import ByteLevelBPETokenizer, Tokenizer
    except ImportError:
        raise RunError(
            f"tokenizer: {path} needs the tokenizers library: {install('huggingface')}"
        ) from None
    try:
        gpt2 = [path / name for name in _GPT2_FILES]
        if path.is_dir() and (path / TOKENIZER_FILE).exists():
            library = Tokenizer.from_file(str(path / TOKENIZER_FILE))
        elif path.is_dir() and all(file.exists() for file in gpt2):
            library = ByteLevelBPETokenizer(*map(str, gpt2))._tokenizer
            if library.token_to_id(END_OF_TEXT) is not None:
                library.add_special_tokens([END_OF_TEXT])
        else:
            library = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise RunError(
            f"tokenizer: expected a tokenizer.json, or a directory with one or with "
            f"{' and '.join(_GPT2_FILES)}, got {path}: {error}"
        ) from None
    library.no_truncation()
    library.no_padding()
    return library

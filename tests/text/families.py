"""A small tokenizer of each family, trained on a few sentences, as a `tokenizer.json`."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as t

SENTENCES = [
    "the cat sat on the mat, and the dog did not care at all.",
    "a tag like </b> or <i> closes; numbers such as 12 and 345 are words too",
    "naïve façades were café signs",
    "the others said nothing then, so there was nothing to hear",
] * 5


def byte_level() -> Tokenizer:
    """GPT-2: bytes as characters, merged; nothing opens or closes a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = t.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama: a blank in front of the text, bytes for what the vocabulary lacks; `<s> $A`."""
    learner = Tokenizer(models.BPE())
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    learner.normalizer = normalizers.Sequence(blanks)
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(SENTENCES, t.BpeTrainer(vocab_size=80, show_progress=False))
    learned = sorted(learner.get_vocab().items(), key=lambda word: word[1])
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{i:02X}>" for i in range(256)), *(name for name, _ in learned)]
    merges = [tuple(pair) for pair in _merges(learner)]
    model = models.BPE(
        {name: i for i, name in enumerate(names)},
        merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(blanks)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(special)
    return _templated(tokenizer, "<s> $A", "<s>")


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def word_piece() -> Tokenizer:
    """BERT: parts of words, blanks lost; `[CLS] $A [SEP]`."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = t.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _templated(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")


def unigram() -> Tokenizer:
    """T5: SentencePiece's likeliest pieces, blanks as a character; `$A </s>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = t.UnigramTrainer(
        vocab_size=90,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _templated(tokenizer, "$A </s>", "</s>")


def word_ends() -> Tokenizer:
    """CLIP and the first GPT: the end of a word is part of its last token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = t.BpeTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<eos>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words, no decoder; special tokens are words of the model, ids have gaps."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    ids = {"[UNK]": 0, "[EOS]": 1} | {word: 3 * i + 5 for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[EOS]"])
    return tokenizer


def _templated(tokenizer: Tokenizer, template: str, *special: str) -> Tokenizer:
    ids = [(name, tokenizer.token_to_id(name)) for name in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (byte_level, byte_fallback, word_piece, unigram, word_ends, word_level)
}


def write_family(name: str, directory: Path) -> Path:
    path = directory / f"{name}.json"
    FAMILIES[name]().save(str(path))
    return path

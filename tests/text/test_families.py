"""Tokenizers of every family: streamed text, templates, tokens that a text spells."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from mdn_jax.errors import RunError
from mdn_jax.text.text import FileText
from mdn_jax.text.tokenizer import FileTokenizer
from tests.text.families import FAMILIES, SENTENCES, write_family

OPENING = {"byte_fallback": ["<s>"], "word_piece": ["[CLS]"]}
CLOSING = {"word_piece": ["[SEP]"], "unigram": ["</s>"]}
END = {
    "byte_level": "<|endoftext|>",
    "byte_fallback": "</s>",
    "word_piece": "[SEP]",
    "unigram": "</s>",
    "word_ends": "<eos>",
    "word_level": "[EOS]",
}
TEXTS = [
    SENTENCES[0],
    "nothing sat, then 12 naïve cats",
    "日本語 and 🙂🙂 é\ufffd x",
    "  two  blanks ",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The name of a family, its text, and the library's tokenizer as the file has it."""
    path = write_family(request.param, tmp_path_factory.mktemp("family"))
    return request.param, FileText(path), Tokenizer.from_file(str(path)), path


def streamed(text, before, tokens, sizes):
    decoder, parts, start = text.decoder(before), [], 0
    for size in sizes:
        parts.append(decoder.add(tokens[start : start + size]))
        start += size
    assert start >= len(tokens)
    return "".join(parts) + decoder.finish()


def cuts(rng, count):
    """Tokens one by one, all together, and in pieces of any size, empty ones too."""
    return [[1] * count, [count], [*rng.integers(0, 5, count).tolist(), count]]


def test_streamed_text_is_that_of_all_tokens(family):
    _, text, library, _ = family
    rng = np.random.default_rng(0)
    for written in TEXTS:
        tokens = text.encode(written)
        for sizes in cuts(rng, len(tokens)):
            assert streamed(text, [], tokens, sizes) == library.decode(tokens)
        for cut in range(1, len(tokens)):
            prompt, rest = tokens[:cut], tokens[cut:]
            shown, whole = library.decode(prompt), library.decode(tokens)
            if "\ufffd" not in shown and whole.startswith(shown) and shown:
                assert shown + streamed(text, prompt, rest, [1] * len(rest)) == whole


def test_a_stream_of_any_tokens(family):
    _, text, library, _ = family
    rng = np.random.default_rng(1)
    for _ in range(30):
        tokens = rng.integers(0, text.vocab_size + 3, 40).tolist()  # as a model with more ids
        for sizes in cuts(rng, len(tokens)):
            assert streamed(text, [], tokens, sizes) == library.decode(tokens)


def test_text_goes_on_behind_tokens_that_are_not_known(family):
    _, text, _, _ = family
    first, whole = text.encode("the"), text.encode("the cat sat")
    assert whole[: len(first)] == first
    assert streamed(text, None, whole[len(first) :], [1] * 20) == " cat sat"


def test_what_opens_and_closes_a_document(family):
    name, text, library, path = family
    opening = [library.token_to_id(token) for token in OPENING.get(name, [])]
    closing = [library.token_to_id(token) for token in CLOSING.get(name, [])]
    body = library.encode(SENTENCES[0], add_special_tokens=False).ids
    assert text.encode(SENTENCES[0]) == opening + body
    assert text.continuation(SENTENCES[0]) == body
    assert text.document(SENTENCES[0]) == library.encode(SENTENCES[0]).ids
    assert text.document(SENTENCES[0]) == opening + body + closing
    assert text.encode("") == opening
    assert text.end_tokens == (library.token_to_id(END[name]),)
    (trained,) = FileTokenizer(path).encode_documents([SENTENCES[0].encode()])
    start = [library.token_to_id(END[name])] if name == "byte_level" else opening
    assert trained.tolist() == start + body + closing


def test_a_pair_is_cut_behind_its_context(family):
    _, text, _, _ = family
    for context, choices in (
        ("the cat sat on", [" the mat", " nothing"]),
        ("the cat ", ["sat", "said nothing"]),
    ):
        pairs = text.pairs(context, choices)
        before = text.encode(context.rstrip())
        for pair, choice in zip(pairs, choices, strict=True):
            assert pair.tokens == text.encode(context + choice)
            assert (pair.tokens[: pair.context], pair.context) == (before, len(before))


def test_a_document_cannot_spell_a_special_token(family):
    name, text, library, path = family
    token = END[name]
    end, trained = library.token_to_id(token), FileTokenizer(path)
    for use in (
        text.encode,
        text.continuation,
        text.document,
        lambda written: text.pairs("the cat", [written])[0].tokens,
        lambda written: text.pairs(f"the {written}", [" sat"])[0].tokens,
        lambda written: trained.encode_documents([written.encode()])[0].tolist(),
    ):
        assert use(f" the{token} sat {token}").count(end) == use(" the sat").count(end)


def test_a_prompt_may_spell_a_special_token(family):
    name, text, library, _ = family
    marked, end = f"the cat{END[name]} sat {END[name]}", library.token_to_id(END[name])
    assert text.encode(marked, special=True).count(end) == 2
    assert text.continuation(marked, special=True).count(end) == 2
    assert end not in text.encode(marked)  # as before
    assert text.encode("the cat sat", special=True) == text.encode("the cat sat")


def test_the_saved_tokenizer_gives_the_same_tokens(family, tmp_path):
    name, _, _, path = family
    trained = FileTokenizer(path)
    trained.save(tmp_path)
    again, text = FileTokenizer(tmp_path), FileText(tmp_path / "tokenizer.json")
    assert again.fingerprint == trained.fingerprint
    assert again.vocab_size == trained.vocab_size == text.vocab_size
    for written in (*TEXTS, f"a{END[name]}b"):
        (ours,), (theirs,) = (x.encode_documents([written.encode()]) for x in (trained, again))
        assert ours.tolist() == theirs.tolist() == text.document(written)


def test_ids_go_up_to_the_highest(family):
    name, text, library, _ = family
    highest = max(library.get_vocab().values())
    assert text.vocab_size == text.vocab_limit == highest + 1
    if name == "word_level":
        assert highest > 2 * library.get_vocab_size()


def test_lone_surrogates_are_refused(family):
    _, text, _, _ = family
    for odd in ("\ud83d", b"\xff".decode(errors="surrogateescape")):
        for use in (
            text.encode,
            text.continuation,
            text.document,
            lambda written: text.pairs(written, ["x"]),
            lambda written: text.pairs("x", [written]),
        ):
            with pytest.raises(RunError, match=r"text: expected UTF-8 text .* lone surrogates"):
                use(f"the cat{odd} sat")

"""Models as lm-evaluation-harness asks them: the same numbers as this project's own evaluator."""

import sys
from typing import NamedTuple

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from mdn_jax import MDNConfig, MDNForCausalLM, Sampling, generate
from mdn_jax.errors import RunError
from mdn_jax.evaluation.harness import Harness, harness_model
from mdn_jax.evaluation.multiple_choice import Question, answer_questions
from mdn_jax.text.text import ByteText, FileText
from mdn_jax.text.tokenizer import DOCUMENT_START, encode
from tests.evaluation.test_token_losses import naive
from tests.tiny import TINY_MODEL, break_model, chain_model


class Request(NamedTuple):
    args: tuple


@pytest.fixture(scope="module")
def model():
    config = MDNConfig(**TINY_MODEL | {"initializer_range": 0.5})
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))


def ask(*arguments):
    return [Request(args) for args in arguments]


def test_log_likelihoods_are_those_of_the_evaluator(model):
    harness = Harness(model, ByteText(), batch_size=2)
    (answer,) = answer_questions(
        model,
        ByteText(),
        [Question("the sky is", (" blue", " é", " x y"), 0)],
        separator="",
        batch_size=2,
    )
    asked = ask(("the sky is", " blue"), ("the sky is", " é"), ("the sky is", " x y"))
    scores = harness.loglikelihood(asked)
    assert [score for score, _ in scores] == pytest.approx(answer.log_likelihoods, rel=1e-6)
    losses = naive(model, encode(b"the sky is blue"))[-5:]
    assert scores[0][0] == pytest.approx(-losses.sum(), rel=1e-5)
    assert harness.loglikelihood([]) == []


def test_the_greedy_continuation_is_said_to_be(model):
    sampling = Sampling(temperature=0.0)
    prompt = encode(b"ab").tolist()
    tokens = generate(model, [prompt], max_new_tokens=4, sampling=sampling).tokens[0]
    assert max(tokens) < DOCUMENT_START
    # every byte is a character of its own on the way through the text
    text = bytes(tokens).decode(errors="surrogateescape")
    other = bytes([*tokens[:3], (tokens[3] + 1) % 128]).decode(errors="surrogateescape")
    scores = Harness(model, ByteText()).loglikelihood(ask(("ab", text), ("ab", other)))
    assert [likeliest for _, likeliest in scores] == [True, False]


def test_rolling_log_likelihoods(model):
    texts = ["one two three", "é", ""]
    harness = Harness(model, ByteText(), window=64)
    scores = harness.loglikelihood_rolling(ask(*((text,) for text in texts)))
    for text, score in zip(texts, scores, strict=True):
        losses = naive(model, encode(text.encode())) if text else np.zeros(1)
        assert score == pytest.approx(-losses.sum(), rel=1e-5)
    cut = Harness(model, ByteText(), window=8).loglikelihood_rolling(ask(("one two three",)))
    assert cut[0] == pytest.approx(scores[0], rel=0.5)
    assert cut[0] != scores[0]


def test_generation_until(model):
    harness = Harness(model, ByteText(), max_new_tokens=6)
    whole, shorter = harness.generate_until(ask(("ab", {}), ("ab", {"max_gen_toks": 3})))
    assert whole
    assert whole.startswith(shorter.rstrip("\ufffd"))
    for stop in ([whole[1]], whole[1]):
        (cut,) = harness.generate_until(ask(("ab", {"until": stop, "do_sample": False})))
        assert cut == whole[: whole.index(whole[1])]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Words that nothing opens; after a comes b, then c, then the end, then d for ever."""
    path = tmp_path_factory.mktemp("chain") / "tokenizer.json"
    words = {"a": 0, "b": 1, "c": 2, "d": 3, "<eos>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return Harness(chain_model([1, 2, 4, 3, 3]), FileText(path), max_new_tokens=8, window=64)


def test_generation_stops_at_the_end_token(chain):
    assert chain.generate_until(ask(("a", {}), ("d a", {"until": ["x", ""]}))) == [" b c", " b c"]
    assert chain.generate_until(ask(("a", {"until": "c"}), ("d", {"max_gen_toks": 2}))) == [
        " b ",
        " d d",
    ]
    assert chain.generate_until(ask(("", {"max_gen_toks": 1}))) == ["d"]  # behind the end token


def test_text_that_nothing_opens_stands_behind_the_end_token(chain):
    likely, unlikely = (chain.loglikelihood(ask((x, y)))[0] for x, y in (("", "d"), ("", "a")))
    assert likely[0] > unlikely[0]
    assert (likely[1], unlikely[1]) == (True, False)
    # d, after the end, and d again
    rolling = chain.loglikelihood_rolling(ask(("d d",), ("d",), ("",)))
    assert rolling == pytest.approx([2 * likely[0], likely[0], 0.0], rel=1e-4)


def test_what_has_nothing_to_score_is_named(chain, model):
    with pytest.raises(RunError, match=r"requests\[1\]: continuation: expected .* own .*got ' '"):
        chain.loglikelihood(ask(("a", " b"), ("a", " ")))
    with pytest.raises(RunError, match=r"requests\[0\]: continuation: expected text with tokens"):
        chain.loglikelihood(ask(("", "")))
    with pytest.raises(RunError, match=r"requests\[2\]: text: expected UTF-8 text"):
        chain.loglikelihood_rolling(ask(("a",), ("b",), ("\ud800",)))
    with pytest.raises(RunError, match=r"requests\[0\]: continuation: .*, got ''"):
        Harness(model, ByteText()).loglikelihood(ask(("ab", "")))


def test_scores_of_a_diverged_model_are_refused(model):
    harness = Harness(break_model(model), ByteText(), window=64)
    finite = r"expected finite log-likelihoods of the model, got nan"
    with pytest.raises(RunError, match=rf"requests\[0\]: {finite}"):
        harness.loglikelihood(ask(("ab", "c")))
    with pytest.raises(RunError, match=rf"requests\[1\]: {finite}"):
        harness.loglikelihood_rolling(ask(("",), ("ab",)))
    with pytest.raises(RunError, match=r"requests\[0\]: model: expected logits to draw from"):
        harness.generate_until(ask(("ab", {})))


def test_the_real_interface(model):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    lm = harness_model(model, ByteText(), batch_size=2)
    assert isinstance(lm, LM)
    request = Instance("loglikelihood", doc={}, arguments=("the sky is", " blue"), idx=0)
    same = Harness(model, ByteText(), batch_size=2)
    expected = same.loglikelihood(ask(("the sky is", " blue")))
    assert lm.loglikelihood([request]) == expected
    assert (lm.rank, lm.world_size) == (0, 1)


def test_bad_arguments(model, monkeypatch):
    for name, value in (("batch_size", 0), ("window", 1), ("max_new_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected an int"):
            Harness(model, ByteText(), **{name: value})
    with pytest.raises(ValueError, match="text: expected ids below the model's 5, got ids up to"):
        Harness(chain_model([0] * 5), ByteText())
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"lm_eval: expected .*the extra 'harness'"):
        harness_model(model, ByteText())

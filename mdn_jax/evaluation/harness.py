"""The interface of lm-evaluation-harness for a model (the extra `harness`).

from lm_eval import simple_evaluate
from mdn_jax.evaluation.harness import harness_model
results = simple_evaluate(model=harness_model(model, text), tasks=["lambada_openai"])
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from mdn_jax.errors import RunError
from mdn_jax.evaluation.token_losses import Row, row_after, strided_rows, token_losses, width_of
from mdn_jax.extras import install
from mdn_jax.models import MDNForCausalLM, Sampling, generate
from mdn_jax.models.decoder import as_decoder
from mdn_jax.models.loss import IGNORED
from mdn_jax.text.text import Text


class Harness:
    """Scores and continues text as the harness asks: `LM` of lm_eval without its base class.

    Args:
      model: the model.
      text: its tokens.
      batch_size: rows in one call.
      window: tokens of a row in `loglikelihood_rolling`, with at least half a window of context
        before each token that has as many before it.
      max_new_tokens: of `generate_until`, where a request does not say.

    Texts are text: a special token that one spells is not that token. What nothing opens (an empty
    context, a whole text) stands behind the tokenizer's end token if it has no opening one.
    Every method raises RunError, with the request's number, for text that the tokenizer cannot
    take, for a continuation without a token of its own, and for likelihoods that are not finite.
    """

    def __init__(
        self,
        model: MDNForCausalLM,
        text: Text,
        *,
        batch_size: int = 8,
        window: int = 2048,
        max_new_tokens: int = 256,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if window < 2:
            raise ValueError(f"window: expected an int >= 2, got {window!r}")
        if text.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"text: expected ids below the model's {model.config.vocab_size}, got ids up to "
                f"{text.vocab_size - 1}"
            )
        self._model, self._text = model, text
        self._decoder = as_decoder(model)
        self._rows, self._window, self._new = batch_size, window, max_new_tokens

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of the continuation, and whether each of its tokens is likeliest.

        Args:
          requests: with `args = (context, continuation)`.
        """
        rows = [self._pair(_place(i), *request.args) for i, request in enumerate(requests)]
        if not rows:
            return []
        width = width_of(rows)
        losses = token_losses(self._model, rows, batch_size=self._rows, width=width)
        likeliest = _likeliest(self._model, rows, batch_size=self._rows, width=width)
        return [
            (-float(np.sum(loss, dtype=np.float64)), bool(right))
            for loss, right in zip(losses, likeliest, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood (nats) of whole texts; 0 of an empty one.

        Args:
          requests: with `args = (text,)`.
        """
        sums = []
        for i, request in enumerate(requests):
            (text,) = request.args
            with _named(_place(i)):
                tokens = self._start(text)
            windows = strided_rows([tokens], width=self._window, stride=self._window // 2)
            rows = [row._replace(place=_place(i)) for row in windows]
            losses = token_losses(self._model, rows, batch_size=self._rows, width=self._window)
            sums.append(-sum((float(np.sum(loss, dtype=np.float64)) for loss in losses), 0.0))
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations up to the tokenizer's end token or the first of the strings in `until`.

        Neither is part of the continuation.

        Args:
          requests: with `args = (context, options)`; of the options `until`, `max_gen_toks`,
            `do_sample`, `temperature`, `top_p` and `top_k` count.
        """
        texts = []
        for i, request in enumerate(requests):
            with _named(_place(i)):
                texts.append(self._continue(*request.args))
        return texts

    def _start(self, text: str) -> list[int]:
        """Tokens of a text from its start, with one before those that are text."""
        first = self._text.encode("") or list(self._text.end_tokens[:1])
        if not first:
            raise RunError("tokenizer: expected a token that opens or ends documents, got none")
        return first + self._text.continuation(text)

    def _pair(self, place: str, context: str, continuation: str) -> Row:
        with _named(place):
            if context or self._text.encode(""):
                ((tokens, count),) = self._text.pairs(context, [continuation])
            else:
                tokens, count = self._start(continuation), 1
            if count == len(tokens):
                raise RunError(f"continuation: expected text with tokens, got {continuation!r}")
        return row_after(tokens, count, place)

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        sampled = bool(options.get("do_sample", False))
        temperature = float(options.get("temperature", 1.0)) if sampled else 0.0
        sampling = Sampling(
            vocab_limit=self._text.vocab_limit,
            temperature=temperature,
            top_k=int(options.get("top_k") or 0) or None,
            top_p=float(options.get("top_p", 1.0)),
        )
        left, state = int(options.get("max_gen_toks", self._new)), None
        prompt = self._text.encode(context) or self._start("")
        text, ended = "", False
        decoder = self._text.decoder(prompt if context else [])
        while left > 0 and not ended:
            count = min(left, 16)
            piece = generate(
                self._decoder,
                [prompt],
                max_new_tokens=count,
                sampling=sampling,
                stop_tokens=self._text.end_tokens,
                state=state,
            )
            (ended,) = piece.ended
            text += decoder.add(piece.tokens[0][:-1] if ended else piece.tokens[0])
            if any(stop in text for stop in until):
                break
            prompt, state, left = [], piece.state, left - count
        text += decoder.finish()
        ends = [text.index(stop) for stop in until if stop in text]
        return text[: min(ends)] if ends else text


def harness_model(model: MDNForCausalLM, text: Text, **options: Any) -> Any:
    """A `Harness` that is an `lm_eval.api.model.LM` too; arguments as of `Harness`.

    Raises:
      ImportError: without lm-evaluation-harness.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError(
            f"lm_eval: expected lm-evaluation-harness, got {error}: {install('harness')}"
        ) from None
    kind = type("HarnessModel", (Harness, LM), {})
    return kind(model, text, **options)


def _place(number: int) -> str:
    return f"requests[{number}]"


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Says which request it was."""
    try:
        yield
    except (RunError, ValueError) as error:
        raise RunError(f"{place}: {error}") from None


def _likeliest(
    model: MDNForCausalLM, rows: Sequence[Row], *, batch_size: int, width: int
) -> Iterator[bool]:
    """Whether every target of a row is the likeliest token there."""
    graph, weights = nnx.split(model)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        tokens = np.zeros((batch_size, width), np.int32)
        targets = np.full((batch_size, width), IGNORED, np.int32)
        for i, row in enumerate(batch):
            tokens[i, : len(row.tokens)] = row.tokens
            targets[i, : len(row.targets)] = row.targets
        choices: NDArray[np.int32] = np.asarray(_choices(graph, weights, tokens))
        right = (choices == targets) | (targets == IGNORED)
        yield from right.all(axis=1)[: len(batch)].tolist()


@partial(jax.jit, static_argnums=0)
def _choices(graph: Any, weights: Any, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The likeliest next token at every step."""
    model = nnx.merge(graph, weights)
    h, _ = model.hidden(tokens)

    def of_step(h: Float[Array, "B hidden"]) -> Int[Array, " B"]:
        return jnp.argmax(model.logits(h), axis=-1)

    # some steps at a time: the logits of all of them together would be the largest array by far
    return jnp.moveaxis(jax.lax.map(of_step, jnp.moveaxis(h, 1, 0), batch_size=64), 0, 1)

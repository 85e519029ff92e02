"""The interface of lm-evaluation-harness for a model (`pip install 'mdn-jax[harness]'`).

from lm_eval import simple_evaluate
from train.harness import harness_model
results = simple_evaluate(model=harness_model(model, text), tasks=["lambada_openai"])
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from mdn_jax import MDNForCausalLM, Sampling, generate
from train.data.packing import IGNORED
from train.evaluate import Row, strided_rows, token_losses
from train.text import Text


class Harness:
    """Scores and continues text as the harness asks: `LM` of lm_eval without its base class.

    Args:
      model: the model.
      text: its tokens.
      batch_size: rows in one call.
      window: tokens of a row in `loglikelihood_rolling`, with at least half a window of context
        before each token that has as many before it.
      max_new_tokens: of `generate_until`, where a request does not say.
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
        self._model, self._text = model, text
        self._rows, self._window, self._new = batch_size, window, max_new_tokens

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of the continuation, and whether each of its tokens is likeliest.

        Args:
          requests: with `args = (context, continuation)`.
        """
        rows = []
        for request in requests:
            pair = self._text.pair(*request.args)
            tokens = np.asarray(pair.tokens, np.int32)
            # the first token of all has nothing to be predicted from
            scored = np.arange(1, len(tokens)) >= pair.context
            targets = np.where(scored, tokens[1:], IGNORED).astype(np.int32)
            rows.append(Row(tokens[:-1], targets))
        if not rows:
            return []
        width = -(-max(1, *(len(row.tokens) for row in rows)) // 64) * 64
        losses = token_losses(self._model, rows, batch_size=self._rows, width=width)
        likeliest = _likeliest(self._model, rows, batch_size=self._rows, width=width)
        return [
            (-float(np.sum(loss, dtype=np.float64)), bool(right))
            for loss, right in zip(losses, likeliest, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood (nats) of whole texts.

        Args:
          requests: with `args = (text,)`.
        """
        sums = []
        for request in requests:
            (text,) = request.args
            rows = list(
                strided_rows(
                    [self._text.encode(text)], width=self._window, stride=self._window // 2
                )
            )
            losses = token_losses(self._model, rows, batch_size=self._rows, width=self._window)
            sums.append(-sum((float(np.sum(loss, dtype=np.float64)) for loss in losses), 0.0))
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations up to the first of the strings in `until`, which is left out.

        Args:
          requests: with `args = (context, options)`; of the options `until`, `max_gen_toks`,
            `do_sample`, `temperature`, `top_p` and `top_k` count.
        """
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        sampled = bool(options.get("do_sample", False))
        temperature = float(options.get("temperature", 1.0)) if sampled else 0.0
        sampling = Sampling(
            vocab_limit=self._text.vocab_limit,
            temperature=temperature,
            top_k=int(options.get("top_k") or 0) or None,
            top_p=float(options.get("top_p", 1.0)),
        )
        left, state = int(options.get("max_gen_toks", self._new)), None
        prompt, text = self._text.encode(context), ""
        decoder = self._text.decoder()
        while left > 0:
            count = min(left, 16)
            piece = generate(
                self._model, [prompt], max_new_tokens=count, sampling=sampling, state=state
            )
            text += decoder.add(piece.tokens[0])
            ends = [text.index(stop) for stop in until if stop in text]
            if ends:
                return text[: min(ends)]
            prompt, state, left = [], piece.state, left - count
        return text + decoder.finish()


def harness_model(model: MDNForCausalLM, text: Text, **options: Any) -> Any:
    """A `Harness` that is an `lm_eval.api.model.LM` too; arguments as of `Harness`.

    Raises:
      ImportError: without lm-evaluation-harness.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError(
            f"lm_eval: expected lm-evaluation-harness (pip install 'mdn-jax[harness]'), got {error}"
        ) from None
    kind = type("HarnessModel", (Harness, LM), {})
    return kind(model, text, **options)


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

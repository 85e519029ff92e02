"""What a trained model does on test documents: by domain, by position, on needles."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from benchmarks.tasks.retrieval import NeedleText, needle_rows
from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models.loss import IGNORED, token_losses
from mdn_jax.ops.api import Implementation
from mdn_jax.text.text import text_of
from mdn_jax.text.tokenizer import Tokenizer

DIGITS = 5
"""Of the number in a needle."""


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
      tokens: in one call of the model, about.
      sequence_length: of the rows of a domain, as in training.
      domain_rows: of each domain, at most.
      position_length: tokens of the rows for the loss by position.
      position_rows: of these, at most.
      needle_lengths: tokens of the rows with a needle.
      needle_rows: of each length.
    """

    tokens: int
    sequence_length: int
    domain_rows: int
    position_length: int
    position_rows: int
    needle_lengths: tuple[int, ...]
    needle_rows: int


class Trained:
    """A model with its parameters, compiled once a shape.

    Args:
      config: of the model.
      params: nested dictionaries.
      implementation: as in training.
      dtype: of activations.
    """

    def __init__(
        self,
        config: MDNConfig,
        params: Any,
        *,
        implementation: Implementation | None,
        dtype: str,
    ) -> None:
        model = nnx.eval_shape(
            lambda: MDNForCausalLM(
                config,
                implementation=implementation,
                dtype=jnp.dtype(dtype),
                rngs=nnx.Rngs(0),
            )
        )
        graph, _, *rest = nnx.split(model, nnx.Param, ...)
        self._params = jax.device_put(params, jax.devices()[0])

        @jax.jit
        def run(
            params: Any,
            tokens: Int[Array, "B T"],
            documents: Int[Array, "B T"],
            targets: Int[Array, "B T"],
        ) -> tuple[Float[Array, "B T"], Int[Array, "B digits"]]:
            model = nnx.merge(graph, params, *rest)
            h, _ = model.hidden(tokens, segment_ids=documents)
            likeliest = jnp.argmax(model.logits(h[:, -DIGITS:]), axis=-1)
            return token_losses(h, model.output_kernel(), targets), likeliest

        self._run = run

    def __call__(
        self, batch: Mapping[str, Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]]]:
        """Nats of every target, 0 where there is none, `[B, T]`; likeliest last tokens."""
        arrays = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "targets"))
        losses, likeliest = self._run(self._params, *arrays)
        return np.asarray(losses), np.asarray(likeliest)


def domains_of(corpus: Path) -> dict[str, Path]:
    """The directories of test shards of a corpus, by domain."""
    return {path.name: path for path in sorted((corpus / "shards" / "test").glob("*"))}


def measure(
    model: Trained, corpus: Path | None, tokenizer: Tokenizer, sizes: Sizes
) -> dict[str, Any]:
    """Everything that is measured of a trained model, as JSON values.

    Args:
      model: trained.
      corpus: whose test documents to read; None: none, and only needles.
      tokenizer: of the model.
      sizes: how much.

    Returns:
      domains: bits per byte by name. positions: first and last place and nats per token, from the
      beginnings of documents of `position_length` tokens. position_documents: their number.
      needle: for each length the share of rows whose digits are all likeliest, and nats a digit.
    """
    found: dict[str, Any] = {"domains": {}, "positions": [], "position_documents": 0}
    if corpus is not None:
        long: list[NDArray[np.int32]] = []
        for name, directory in domains_of(corpus).items():
            found["domains"][name] = _domain(model, directory, tokenizer, sizes, long)
        found["position_documents"] = min(len(long), sizes.position_rows)
        found["positions"] = _positions(model, long, sizes)
    try:
        text = NeedleText.of(text_of(tokenizer).continuation)
    except ValueError:  # of a tokenizer that joins digits
        return found | {"needle": {}}
    return found | {"needle": _needles(model, text, sizes)}


def _domain(
    model: Trained,
    directory: Path,
    tokenizer: Tokenizer,
    sizes: Sizes,
    long: list[NDArray[np.int32]],
) -> float | None:
    """Bits per byte; adds beginnings of long documents to `long`. None: not finite."""
    from train.data.packing import held_out_batches
    from train.data.shards import map_shards

    paths = sorted(directory.glob("*.tokens"))
    documents = map_shards(paths, tokenizer, verify=False).documents
    batches = held_out_batches(
        documents,
        batch_size=max(1, sizes.tokens // sizes.sequence_length),
        sequence_length=sizes.sequence_length,
        max_rows=sizes.domain_rows,
    )
    nats = sum(float(model(batch)[0].sum(dtype=np.float64)) for batch in batches)
    count = sum(int((batch["targets"] != IGNORED).sum()) for batch in batches)
    length = sizes.position_length + 1
    for i in np.flatnonzero(documents.length >= length).tolist():
        long.append(documents.read(i, 0, length).astype(np.int32))
    bits = nats / count / documents.bytes_per_target / math.log(2)
    return bits if math.isfinite(bits) else None


def _positions(
    model: Trained, long: Sequence[NDArray[np.int32]], sizes: Sizes
) -> list[list[float | None]]:
    """Mean loss between places that double; documents at even distances of all domains."""
    if not long:
        return []
    count = min(len(long), sizes.position_rows)
    rows = [long[i * len(long) // count] for i in range(count)]
    together = max(1, sizes.tokens // sizes.position_length)
    total = np.zeros(sizes.position_length)
    for begin in range(0, count, together):
        some = rows[begin : begin + together]
        filled = np.stack([*some, *[rows[0]] * (together - len(some))])
        batch = {"tokens": filled[:, :-1], "targets": filled[:, 1:]}
        batch["segment_ids"] = np.zeros_like(batch["tokens"])
        total += model(batch)[0][: len(some)].sum(axis=0, dtype=np.float64)
    mean = total / count
    edges = [0]
    while edges[-1] < sizes.position_length:
        edges.append(min(max(2 * edges[-1], 128), sizes.position_length))
    parts = []
    for first, last in pairwise(edges):
        nats = float(mean[first:last].mean())
        parts.append([first, last, nats if math.isfinite(nats) else None])
    return parts


def _needles(model: Trained, text: NeedleText, sizes: Sizes) -> dict[str, list[float | None]]:
    found = {}
    for length in sizes.needle_lengths:
        together = max(1, min(sizes.needle_rows, sizes.tokens // length))
        right, nats, rows = 0, 0.0, 0
        while rows < sizes.needle_rows:
            key = jax.random.fold_in(jax.random.key(length), rows)
            tokens, targets = needle_rows(key, together, length, DIGITS, text)
            batch = {"tokens": tokens, "targets": targets, "segment_ids": jnp.zeros_like(tokens)}
            losses, likeliest = model(batch)
            nats += float(losses.sum(dtype=np.float64))
            hits = likeliest == np.asarray(targets)[:, -DIGITS:]
            right, rows = right + int(hits.all(axis=1).sum()), rows + together
        each = nats / rows / DIGITS
        found[str(length)] = [right / rows, each if math.isfinite(each) else None]
    return found

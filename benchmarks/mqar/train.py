"""The steps of the training: one member is one seed with one learning rate; `jax.vmap` over them.

- Rows are drawn before, the same for all models; they lie on the device.
- A call trains any part of an epoch: the loop over batches is on the device, and so is the choice
  between batches of the settings, whose shapes differ.
- A seed stands for an initialisation, an order of the rows and what is dropped. All of it follows
  from the numbers of seed, epoch and batch, so that nothing of it needs to be saved.
- A member that is done stays as it is while the others go on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from benchmarks.mqar.data import Rows, Setting, draw_rows
from benchmarks.mqar.model import RecallModel, Shape, initial_params
from mdn_jax.ops.api import Implementation
from train.optimizer import decay_mask

_TRAINED, _CHOICE, _TEST, _BATCHES, _ORDER = range(5)  # what is drawn with the seed of the data
_DROPOUT, _WEIGHTS = range(2)  # what is drawn on the device with the seed of a member
_QUERIES = 12_800  # most of a measurement at once, for each member


class Recipe(NamedTuple):
    """How every model is trained and measured.

    Attributes:
      trained: settings of the training's rows.
      measured: settings with numbers of pairs that the training has.
      extrapolated: settings with more pairs, and longer, than the training has.
      epochs: passes over the rows, at most.
      batch_size: rows of a step, all of one setting; what is left over of a setting in an epoch is
        not used in it.
      weight_decay: of projections, convolutions and embeddings, as in `train.optimizer`.
      stop_at: a member is done when its validation accuracy, the mean of all settings, is above it.
      data_seed: of all rows.
      implementation: of the mixer's rule.
      dtype: of activations.
    """

    trained: tuple[Setting, ...]
    measured: tuple[Setting, ...]
    extrapolated: tuple[Setting, ...]
    epochs: int
    batch_size: int
    weight_decay: float
    stop_at: float
    data_seed: int
    implementation: Implementation | None
    dtype: str


class Data(NamedTuple):
    """Rows of every setting.

    Attributes:
      trained: of `Recipe.trained`.
      choice: of `Recipe.measured` and `Recipe.extrapolated`, for the choice of the learning rate
        and the early stop.
      test: of the same settings, for the accuracy that is reported.
    """

    trained: tuple[Rows, ...]
    choice: tuple[Rows, ...]
    test: tuple[Rows, ...]


def draw_data(recipe: Recipe, vocabulary: int) -> Data:
    """Draws all rows (seconds)."""

    def draw(part: int, settings: Sequence[Setting]) -> tuple[Rows, ...]:
        return tuple(
            draw_rows(setting, (recipe.data_seed, part, i), vocabulary)
            for i, setting in enumerate(settings)
        )

    measured = recipe.measured + recipe.extrapolated
    return Data(draw(_TRAINED, recipe.trained), draw(_CHOICE, measured), draw(_TEST, measured))


def batch_order(recipe: Recipe, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The setting of each step of an epoch, and the number of its batch in that setting."""
    counts = [setting.rows // recipe.batch_size for setting in recipe.trained]
    settings = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    numbers = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    order = np.random.default_rng((recipe.data_seed, _BATCHES, epoch)).permutation(len(numbers))
    return settings[order], numbers[order]


@functools.lru_cache(maxsize=1)  # asked for again by every call of an epoch
def row_order(recipe: Recipe, seeds: tuple[int, ...], epoch: int) -> tuple[Array, ...]:
    """The order of each setting's rows in an epoch, `[M, R]`: one for each of the seeds."""
    return tuple(
        jnp.asarray(
            np.stack(
                [
                    np.random.default_rng((recipe.data_seed, _ORDER, seed, epoch, i)).permutation(
                        np.arange(setting.rows, dtype=np.int32)
                    )
                    for seed in seeds
                ]
            )
        )
        for i, setting in enumerate(recipe.trained)
    )


class Member(NamedTuple):
    """One run; stacked, every leaf has a leading axis of members.

    Attributes:
      params: of the model.
      opt_state: of Adam.
      done: nothing changes any more.
      loss: sum over the epoch's steps so far, nats a query.
    """

    params: Any
    opt_state: Any
    done: Bool[Array, "*M"]
    loss: Float[Array, "*M"]


class Stretch(NamedTuple):
    """Steps of an epoch, the same for all members.

    Attributes:
      settings: of every step of the epoch, `[steps]`.
      numbers: of their batches, `[steps]`.
      epoch: its number.
      begin: first step that is taken.
      end: behind the last one.
    """

    settings: Int[Array, " steps"]
    numbers: Int[Array, " steps"]
    epoch: Int[Array, ""]
    begin: Int[Array, ""]
    end: Int[Array, ""]


class Steps:
    """The functions of a group of members, compiled once for each number of members.

    Args:
      shape: of the model.
      recipe: of the training.
    """

    def __init__(self, shape: Shape, recipe: Recipe):
        self._shape, self._recipe = shape, recipe
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: self._make(jax.random.key(0))))
        self._optimizer = optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(recipe.weight_decay, mask=decay_mask),
        )
        self.start = jax.vmap(self._start)
        members = (0, 0, 0, 0, None, None)
        self.advance = jax.jit(jax.vmap(self._advance, in_axes=members), donate_argnums=0)
        self.measure = jax.jit(jax.vmap(self._measure, in_axes=(0, None)))

    def _make(self, key: Array) -> RecallModel:
        recipe = self._recipe
        return RecallModel(
            self._shape,
            implementation=recipe.implementation,
            dtype=jnp.dtype(recipe.dtype),
            rngs=nnx.Rngs(params=key),
        )

    def _start(self, seed: Int[Array, ""]) -> Member:
        """Before the first step."""
        model = self._make(_key(seed, _WEIGHTS))
        params = initial_params(model, self._shape)
        zero = jnp.zeros(())
        return Member(params, self._optimizer.init(params), zero > 0, zero)

    def _advance(
        self,
        member: Member,
        seed: Int[Array, ""],
        rate: Float[Array, ""],
        orders: tuple[Int[Array, " R"], ...],
        rows: tuple[Rows, ...],
        stretch: Stretch,
    ) -> Member:
        """The steps of a stretch.

        Args:
          member: the run.
          seed: its seed.
          rate: its learning rate in this epoch.
          orders: of the rows of every setting.
          rows: of every setting.
          stretch: which steps of which epoch.
        """
        size, settings, numbers = self._recipe.batch_size, stretch.settings, stretch.numbers
        gradient = jax.value_and_grad(self._loss)

        def of_setting(i: int) -> Callable[..., Any]:
            def run(params: Any, number: Array, key: Array) -> Any:
                chosen = jax.lax.dynamic_slice_in_dim(orders[i], number * size, size)
                batch = jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), rows[i])
                return gradient(params, batch, key)

            return run

        branches = [of_setting(i) for i in range(len(rows))]

        def step(i: Array, member: Member) -> Member:
            key = jax.random.fold_in(_key(seed, _DROPOUT), stretch.epoch * len(settings) + i)
            loss, grads = jax.lax.switch(settings[i], branches, member.params, numbers[i], key)
            updates, opt_state = self._optimizer.update(grads, member.opt_state, member.params)
            params = jax.tree.map(lambda x, change: x - rate * change, member.params, updates)
            new = member._replace(params=params, opt_state=opt_state, loss=member.loss + loss)
            return jax.tree.map(lambda x, y: jnp.where(member.done, x, y), member, new)

        return jax.lax.fori_loop(stretch.begin, stretch.end, step, member)

    def _loss(self, params: Any, batch: Rows, key: Array) -> Float[Array, ""]:
        """Mean cross entropy of the queries."""
        model = nnx.merge(self._graph, params)
        logits = model(batch.tokens, batch.places, key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers)
        return jnp.mean(losses)

    def _measure(self, params: Any, rows: tuple[Rows, ...]) -> Float[Array, " settings"]:
        """Part of the queries answered right, for each setting."""
        model = nnx.merge(self._graph, params)

        def right(part: Rows) -> Float[Array, ""]:
            logits = model(part.tokens, part.places)
            return jnp.mean(jnp.argmax(logits, axis=-1) == part.answers)

        means = []
        for own in rows:
            count, pairs = own.places.shape
            size = max(n for n in range(1, count + 1) if not count % n and n * pairs <= _QUERIES)
            parts = jax.tree.map(lambda x, n=size: x.reshape(-1, n, x.shape[1]), own)
            means.append(jnp.mean(jax.lax.map(right, parts)))
        return jnp.stack(means)


def epoch_factor(recipe: Recipe, epoch: int) -> float:
    """Of the learning rate: half a cosine, one value for all steps of an epoch."""
    return 0.5 * (1 + float(np.cos(np.pi * epoch / recipe.epochs)))


def _key(seed: Int[Array, ""], use: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), use)

"""Trains one model on one task from several seeds and learning rates at once, on the device."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from benchmarks.initial_factors import PUBLISHED_FACTOR, with_largest_factor
from benchmarks.tasks.task import IGNORED, Examples, Task
from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.ops.api import Implementation
from train.config_sections import OptimizerConfig
from train.optimizer import make_optimizer, make_schedule


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
      steps: optimizer steps.
      batch_size: rows in a step.
      weight_decay: of matrices.
      points: measurements on the way, the last one at the end.
      test_rows: rows of each of the two final measurements.
      implementation: of the mixer's rule.
      dtype: of activations.
      largest_factor: of MDN's gates, `exp(log_factor)`, at initialisation.
    """

    steps: int
    batch_size: int
    weight_decay: float
    points: int
    test_rows: int
    implementation: Implementation | None
    dtype: str
    largest_factor: float = PUBLISHED_FACTOR


class Score(NamedTuple):
    """Of one seed and learning rate, at one level of the task.

    Attributes:
      level: of the rows it was measured on.
      seed: of parameters and data.
      learning_rate: its peak.
      choice: accuracy on rows by which a learning rate may be chosen.
      accuracy: on other rows, part of the targets predicted right.
      loss: on these, nats a target.
      curve: steps, training loss and training accuracy at each point, of all levels.
    """

    level: int
    seed: int
    learning_rate: float
    choice: float
    accuracy: float
    loss: float
    curve: list[tuple[int, float, float]]


class Member(NamedTuple):
    """One run, or several, stacked.

    Attributes:
      params: of the model.
      opt_state: of the optimizer.
      rate: learning rate at its peak.
      data: key of all batches.
    """

    params: Any
    opt_state: optax.OptState
    rate: Float[Array, ""]
    data: PRNGKeyArray


def train_task(
    task: Task,
    model: MDNConfig,
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    learning_rates: Sequence[float],
) -> list[Score]:
    """Trains every seed with every learning rate; all of them run side by side.

    Every batch has one of the task's levels, drawn at random.

    Nothing leaves the device between two measurements: batches are drawn there.

    Args:
      task: where rows come from.
      model: sizes and mixer.
      recipe: of the training.
      seeds: each is one initialisation and one sequence of batches.
      learning_rates: peaks.
    """
    runs = [(seed, rate) for seed in seeds for rate in learning_rates]
    points = min(recipe.points, recipe.steps)
    ends = [round(recipe.steps * (i + 1) / points) for i in range(points)]
    steps = Steps(task, model, recipe)
    state = jax.vmap(steps.start)(  # not compiled as a whole, which takes longer than it saves
        jnp.asarray([seed for seed, _ in runs]), jnp.asarray([rate for _, rate in runs])
    )
    curves: list[list[tuple[int, float, float]]] = [[] for _ in runs]
    advance = jax.jit(jax.vmap(steps.advance, in_axes=(0, None, None)), donate_argnums=0)
    begun = 0
    for end in ends:
        state, loss, accuracy = advance(state, begun, end)
        for curve, x, y in zip(curves, loss.tolist(), accuracy.tolist(), strict=True):
            curve.append((end, x, y))
        begun = end
    measure = jax.jit(jax.vmap(steps.measure, in_axes=(0, None, None)))
    scores = []
    for level in task.levels:
        _, choice = measure(state, 0, level)
        loss, accuracy = measure(state, 1, level)
        for i, (seed, rate) in enumerate(runs):
            measured = float(choice[i]), float(accuracy[i]), float(loss[i])
            scores.append(Score(level, seed, rate, *measured, curves[i]))
    return scores


class Steps:
    """The functions of one run; every run is one element of their `jax.vmap`.

    Args:
      task: where rows come from.
      model: sizes and mixer.
      recipe: of the training.

    Attributes:
      graph: of the model, for `nnx.merge` with a member's parameters.
    """

    def __init__(self, task: Task, model: MDNConfig, recipe: Recipe):
        self._task, self._recipe = task, recipe
        self._make = functools.partial(
            MDNForCausalLM,
            model,
            implementation=recipe.implementation,
            dtype=jnp.dtype(recipe.dtype),
        )
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: self._make(rngs=nnx.Rngs(0))))
        # a peak of 1: every run scales its updates by its own learning rate
        warmup = recipe.steps // 10
        self._optimizer_config = OptimizerConfig(
            learning_rate=1.0,
            warmup_steps=warmup,
            epsilon=1e-8,
            weight_decay=recipe.weight_decay,
        )
        schedule = make_schedule(self._optimizer_config, recipe.steps)
        self._optimizer = make_optimizer(self._optimizer_config, schedule)

    def start(self, seed: Int[Array, ""], rate: Float[Array, ""]) -> Member:
        """Before the first step."""
        weights, data = jax.random.split(jax.random.key(seed))
        model = self._make(rngs=nnx.Rngs(params=weights))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        params = with_largest_factor(params, self._recipe.largest_factor)
        return Member(params, self._optimizer.init(params), rate, data)

    def advance(
        self, run: Member, begin: Int[Array, ""], end: Int[Array, ""]
    ) -> tuple[Member, Float[Array, ""], Float[Array, ""]]:
        """Steps from `begin` to `end`; mean loss and accuracy of their batches."""

        def step(i: Array, carry: tuple[Member, Array, Array]) -> tuple[Member, Array, Array]:
            run, losses, accuracies = carry
            of_level, of_rows = jax.random.split(jax.random.fold_in(run.data, i))
            level = jax.random.choice(of_level, jnp.asarray(self._task.levels))
            examples = self._task.sample(of_rows, self._recipe.batch_size, level)
            gradient = jax.value_and_grad(self._loss, has_aux=True)
            (loss, accuracy), grads = gradient(run.params, examples)
            updates, opt_state = self._optimizer.update(grads, run.opt_state, run.params)
            updates = jax.tree.map(lambda x: run.rate * x, updates)
            params = optax.apply_updates(run.params, updates)
            run = run._replace(params=params, opt_state=opt_state)
            return run, losses + loss, accuracies + accuracy

        zero = jnp.zeros(())
        run, loss, accuracy = jax.lax.fori_loop(begin, end, step, (run, zero, zero))
        return run, loss / (end - begin), accuracy / (end - begin)

    def measure(
        self, run: Member, part: Int[Array, ""], level: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Loss and accuracy on rows that were not trained on; the two parts share none."""
        batches = max(1, self._recipe.test_rows // self._recipe.batch_size)

        def batch(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            key = jax.random.fold_in(run.data, self._recipe.steps + part * batches + i)
            examples = self._task.sample(key, self._recipe.batch_size, level)
            loss, accuracy = self._loss(run.params, examples)
            return (carry[0] + loss / batches, carry[1] + accuracy / batches), None

        zero = jnp.zeros(())
        return jax.lax.scan(batch, (zero, zero), jnp.arange(batches))[0]

    def _loss(self, params: Any, examples: Examples) -> tuple[Array, Array]:
        """Mean cross entropy of the targets that count, and the part of them predicted right."""
        model = nnx.merge(self.graph, params)
        logits, _ = model(examples.tokens)
        counted = examples.targets != IGNORED
        targets = jnp.where(counted, examples.targets, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        right = jnp.argmax(logits, axis=-1) == targets
        count = jnp.sum(counted)
        return jnp.sum(losses * counted) / count, jnp.sum(right & counted) / count

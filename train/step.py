"""One optimizer step as a pure function of the state and the batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mdn_jax import MDNForCausalLM
from mdn_jax.models.loss import IGNORED, summed_loss
from train.config_sections import GuardConfig
from train.data.packing import Batch
from train.freezing import held, kept
from train.guard import Guard, init_guard, judge
from train.optimizer import Params, group_norms, is_projection
from train.parallel.own_tokens import OwnTokens
from train.stacking import unstacked

# (parameters, batch) -> loss summed over the batch's targets, nats
Loss = Callable[[Params, Batch], Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that a step changes; a pytree.

    Attributes:
      params: parameters, nested dictionaries of float32 arrays, equal layers stacked
        (`train.stacking`); so are the moments.
      opt_state: state of the optimizer.
      step: steps taken, skipped ones included; also the position in the data.
      skipped: steps refused, see `train.guard`.
      guard: statistics of the steps taken.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    guard: Guard


class StepMetrics(NamedTuple):
    """Scalars of one step.

    Attributes:
      loss: mean over the batch's targets, nats per token.
      grad_norm: global norm of the gradient before clipping.
      learning_rate: of this step's update.
      skipped: steps refused so far, this one included.
      refused: steps refused one after the other, this one included.
      spike: whether this one was, as a spike.
      grad_norms: norm of the gradient of each group of parameters.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Int[Array, ""]
    refused: Int[Array, ""]
    spike: Bool[Array, ""]
    grad_norms: dict[str, Float[Array, ""]]


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """The metrics as numbers by name, once the step is done: "loss", "grad_norm/gates", ..."""
    values = jax.device_get(metrics)._asdict()
    groups = values.pop("grad_norms")
    values |= {f"grad_norm/{name}": value for name, value in groups.items()}
    return {name: value.item() for name, value in values.items()}


def split_model(model: MDNForCausalLM) -> tuple[Loss, Params]:
    """Separates a model into a pure function, its summed loss, and its parameters."""
    graph, params, *rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        run = nnx.merge(graph, params, *rest)
        documents = batch.get("segment_ids")  # none: a row is one document
        h, _ = run.hidden(
            jnp.asarray(batch["tokens"]),
            segment_ids=None if documents is None else jnp.asarray(documents),
        )
        return summed_loss(h, run.output_kernel(), batch["targets"])

    return loss, nnx.to_pure_dict(params)


def rounded(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """The parameters with the matrices of projections in the compute dtype.

    The layers would round these themselves, in every micro-batch and again where activations are
    computed again. All others, among them embeddings and convolutions, are used in full precision.
    """

    def cast(path: tuple[Any, ...], x: Array) -> Array:
        return x.astype(dtype) if is_projection(path, x) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # donated: two buffers
    return TrainState(params, optimizer.init(params), step, skipped, init_guard())


def make_update(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    guard: GuardConfig,
    frozen: Params | None = None,
) -> Callable[[TrainState, Float[Array, ""], Params], tuple[TrainState, StepMetrics]]:
    """Builds what a step does with its loss and gradient: `(state, loss, gradient) -> ...`."""

    def update(
        state: TrainState, loss: Float[Array, ""], gradient: Params
    ) -> tuple[TrainState, StepMetrics]:
        norm = optax.tree.norm(gradient)
        taken, spike, statistics = judge(guard, state.guard, loss, norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        proposed = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), proposed, (state.params, state.opt_state)
        )
        params = kept(params, state.params, frozen)
        skipped = state.skipped + ~taken
        metrics = StepMetrics(
            loss=loss,
            grad_norm=norm,
            learning_rate=jnp.asarray(schedule(state.step - state.skipped)),
            skipped=skipped,
            refused=statistics.refused,
            spike=spike,
            grad_norms=group_norms(gradient),
        )
        return TrainState(params, opt_state, state.step + 1, skipped, statistics), metrics

    return update


def make_train_step(
    summed_loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    of_stacks: bool = False,
    guard: GuardConfig | None = None,
    frozen: Params | None = None,
    accumulation: int = 1,
    dtype: jax.typing.DTypeLike = jnp.float32,
    tokens: OwnTokens | None = None,
    state_sharding: Any = None,
    batch_sharding: Any = None,
    metrics_sharding: Any = None,
    compiler_options: Mapping[str, bool | int] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Builds the compiled step.

    The loss is the mean over all targets of the batch, whatever the number of micro-batches: each
    contributes its sum, divided by the whole batch's count. A step that is refused changes nothing
    but the counts of steps.

    Args:
      summed_loss: of the model, over a batch's targets.
      optimizer: update rule.
      schedule: its learning rate, for the metrics.
      of_stacks: whether `summed_loss` takes the parameters stacked, not by layer.
      guard: which steps are refused beside those that are not finite; None: none.
      frozen: which parameters stay as they are (`frozen_mask`), stacked as the state is, for an
        optimizer that knows of them (`without_frozen`); None: none. The gradient's norm is that of
        the others.
      accumulation: micro-batches to cut the batch into, along its rows.
      dtype: of the model's computation; the matrices are rounded to it once a step.
      tokens: of the mesh: the gradient is added up over its axes `data` and `context` once, after
        the last micro-batch, or with a single one layer by layer; None: one device, or the
        partitioner's.
      state_sharding: where the state lies before and after; None: as it comes.
      batch_sharding: where every array of a batch lies.
      metrics_sharding: where the metrics go.
      compiler_options: XLA's, by name, for this program alone; None: as they are.

    Returns:
      Function `(state, batch) -> (state, metrics)`; the buffers of `state` are reused.
    """
    tokens = tokens or OwnTokens()

    def loss_and_gradient(params: Params, batch: Batch) -> tuple[Float[Array, ""], Params]:
        def of_own(whole: tuple[Params, Array], batch: Batch) -> tuple[Array, Params]:
            low, count = whole

            def loss(low: Params, micro: Batch, one: bool = False) -> Float[Array, ""]:
                layers = held(low, frozen)
                layers = layers if of_stacks else unstacked(layers)
                # a single gradient is added up layer by layer, beside the layers that are left;
                # stacks as a whole
                layers = tokens.summed_gradient(layers) if one else layers
                return summed_loss(layers, micro) / count

            gradient = jax.value_and_grad(loss)
            if accumulation == 1:
                value, gradients = gradient(low, batch, one=True)
                return tokens.together(value), gradients

            def add(carry: Any, micro: Batch) -> tuple[Any, None]:
                return jax.tree.map(
                    lambda x, y: x + y.astype(x.dtype), carry, gradient(low, micro)
                ), None

            # every device's rows go into every micro-batch
            micros = jax.tree.map(
                lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1), batch
            )
            zeros = jax.tree.map(lambda x, like: jnp.zeros_like(x, like.dtype), low, params)
            return tokens.together(lax.scan(add, (jnp.zeros(()), zeros), micros)[0])

        count = jnp.maximum(jnp.sum(batch["targets"] != IGNORED), 1)
        value, gradients = tokens.on_each(of_own)((rounded(params, dtype), count), batch)
        if accumulation == 1:
            # a stack's gradient is joined once: joined where it is used, moments are not updated in
            # place
            gradients = lax.optimization_barrier(gradients)
        return value, jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, params)

    update = make_update(optimizer, schedule, guard or GuardConfig(), frozen)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return update(state, *loss_and_gradient(state.params, batch))

    return jax.jit(
        train_step,
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, metrics_sharding),
        donate_argnums=0,
        compiler_options=dict(compiler_options or {}),
    )

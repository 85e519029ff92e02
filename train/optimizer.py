"""AdamW as published, or Muon; clipping; schedules; a moving average of the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, muon

from mdn_jax.saved.model import Params
from train.config_sections import OptimizerConfig
from train.freezing import kept
from train.stacking import LAYERS, STACKS, is_stacked

# Every parameter's own name is in one of the two sets, so that a new one needs a decision.
_PROJECTIONS = (
    "a_proj",
    "b_proj",
    "m_proj",
    "e_proj",
    "w_proj",
    "dt_proj",
    "lam_proj",
    "angle_proj",
)
DECAYED = frozenset({"kernel", "embeddings", "lm_head", "q_bias", "k_bias", *_PROJECTIONS})
NOT_DECAYED = frozenset(
    {"a_log", "dt_bias", "mu_bias", "mu_log", "log_factor", "b_bias"}
    | {"d_log", "decay", "d", "bias", "scale"}
)


_LONGEST_WARMUP = 1024  # updates, the published ones


# of Muon's updates, as AdamW's have: one learning rate and decay serve both (arXiv 2502.16982)
_MUON_RMS = 0.2


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each update (from 0): linear from 0 to the peak, then `config.schedule`.

    Args:
      config: its kind, peak, warm-up, cool-down and final fraction.
      steps: the update at which it ends, unless the configuration names one.

    Returns:
      Function from the number of updates made to the learning rate.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = config.decay_steps or steps
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(_LONGEST_WARMUP, decay_steps // 10)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            end_value=end,
        )
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup_steps])
    falls = decay_steps - warmup_steps
    if config.schedule == "wsd":
        falls = min(config.cooldown_steps or max(decay_steps // 5, 1), falls)
    fall = optax.linear_schedule(
        peak, end, falls, transition_begin=decay_steps - warmup_steps - falls
    )
    return optax.join_schedules([rise, fall], [warmup_steps])


def decay_mask(params: Params) -> Params:
    """Which parameters weight decay applies to, by name.

    True for projections, embeddings and convolutions; False for gate parameters, norms and biases.

    Raises:
      KeyError: a parameter of neither kind.
    """

    def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
        name = str(path[-1].key)
        if name in DECAYED:
            return True
        if name in NOT_DECAYED:
            return False
        raise KeyError(
            f"{jax.tree_util.keystr(path, simple=True, separator='.')}: expected a parameter "
            f"named in train.optimizer's DECAYED or NOT_DECAYED, got {name!r}"
        )

    return jax.tree_util.tree_map_with_path(decays, params)


# by the first of these names that is in a parameter's path
_GROUPS = {
    "embeddings": "embeddings",
    "lm_head": "head",
    "gates": "gates",
    "d_log": "gates",
    **dict.fromkeys((*_PROJECTIONS, "f_proj", "q_bias", "k_bias"), "gates"),
    **dict.fromkeys(("a_log", "dt_bias", "decay", "d"), "gates"),
    "q_conv1d": "convolutions",
    "k_conv1d": "convolutions",
    "v_conv1d": "convolutions",
    "scale": "norms",
    "mlp": "mlp",
    "mixer": "projections",
}


def group(path: tuple[Any, ...]) -> str:
    """The kind of a parameter, for metrics: "embeddings", "head", "gates", ... or "other"."""
    words = {str(entry.key) for entry in path}
    return next((name for word, name in _GROUPS.items() if word in words), "other")


def group_norms(gradient: Params) -> dict[str, Float[Array, ""]]:
    """Norm of the gradient of each group of parameters, in float32."""
    groups: dict[str, list[Array]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        groups.setdefault(group(path), []).append(x)
    return {name: optax.tree.norm(leaves) for name, leaves in sorted(groups.items())}


def is_projection(path: tuple[Any, ...], x: Any) -> bool:
    """Whether a parameter, of a layer or a stack, is the matrix of a projection."""
    matrix = x.ndim - is_stacked(path) == 2
    return matrix and any(str(entry.key).endswith("_proj") for entry in path)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clipping by the global norm, then the update rule with decay where `decay_mask` says."""
    rule = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.name == "muon":
        rule = optax.partition({"muon": _muon(config, schedule), "adamw": rule}, _rules)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _rules(params: Params) -> Params:
    def rule(path: tuple[Any, ...], x: Any) -> str:
        inside = str(path[0].key) in (LAYERS, STACKS)
        return "muon" if inside and is_projection(path, x) else "adamw"

    return jax.tree_util.tree_map_with_path(rule, params)


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon of every array that it is given: a matrix, or a stack of them, each by itself."""
    matrices = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return muon(
        schedule,
        beta=config.muon_beta,
        weight_decay=config.weight_decay,
        consistent_rms=_MUON_RMS,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: matrices, params),
    )


class Averaged(NamedTuple):
    """State of an optimizer that keeps a moving average of the parameters.

    Attributes:
      inner: of the optimizer.
      average: of the parameters.
    """

    inner: optax.OptState
    average: Params


def with_average(
    optimizer: optax.GradientTransformation, decay: float | None, frozen: Params | None = None
) -> optax.GradientTransformation:
    """The optimizer with a moving average of the parameters after each update.

    It begins with the first parameters.

    Args:
      optimizer: of the parameters.
      decay: of the average; None: there is none.
      frozen: which parameters stay as they are, in the average too.
    """
    if decay is None:
        return optimizer

    def init(params: Params) -> Averaged:
        return Averaged(optimizer.init(params), jax.tree.map(jnp.copy, params))

    def update(
        updates: Params, state: Averaged, params: Params | None = None
    ) -> tuple[Params, Averaged]:
        updates, inner = optimizer.update(updates, state.inner, params)
        new = optax.apply_updates(params, updates)
        average = optax.incremental_update(new, state.average, 1 - decay)
        return updates, Averaged(inner, kept(average, state.average, frozen))

    return optax.GradientTransformation(init, update)


def average_of(opt_state: optax.OptState) -> Params | None:
    """The moving average of the parameters; None: there is none."""
    return opt_state.average if isinstance(opt_state, Averaged) else None

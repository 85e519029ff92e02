"""AdamW as published: warm-up and cosine, clipping, weight decay of matrices only."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from mdn_jax.saved.model import Params
from train.config_sections import OptimizerConfig

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


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each update (from 0): linear from 0 to the peak, then half a cosine.

    Args:
      config: peak, warm-up and final fraction.
      steps: the update at which the cosine ends, unless the configuration names one.

    Returns:
      Function from the number of updates made to the learning rate.
    """
    decay_steps = config.decay_steps or steps
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(_LONGEST_WARMUP, decay_steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        end_value=config.learning_rate * config.final_fraction,
    )


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


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decay where `decay_mask` says."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )

"""Steps that are not taken: a loss or gradient that is not finite, or far above those before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.errors import RunError
from train.config_sections import GuardConfig


class DivergedError(RunError):
    """A run that the guard ended.

    Attributes:
      step: the last one computed.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class Guard(NamedTuple):
    """Running statistics of the steps that were taken; a pytree of scalars.

    Attributes:
      taken: steps in the statistics.
      loss: running mean of their losses, nats/token.
      variance: running variance of their losses.
      grad_norm: running mean of their gradients' norms.
      refused: steps refused one after the other, up to the last.
    """

    taken: Int[Array, ""]
    loss: Float[Array, ""]
    variance: Float[Array, ""]
    grad_norm: Float[Array, ""]
    refused: Int[Array, ""]


def init_guard() -> Guard:
    """Statistics of no steps."""

    def zero() -> Array:  # donated: a buffer each
        return jnp.zeros((), jnp.float32)

    count, refused = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return Guard(count, zero(), zero(), zero(), refused)


def judge(
    config: GuardConfig, guard: Guard, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], Bool[Array, ""], Guard]:
    """Whether a step is taken, whether it is a spike, and the statistics after it.

    The same scalars on every device, so the same answer on every device.

    Args:
      config: what a spike is and what follows from one.
      guard: statistics of the steps before.
      loss: of the step.
      grad_norm: global norm of its gradient.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    limit = guard.loss + config.loss_deviations * jnp.sqrt(guard.variance)
    high = (loss > limit) | (grad_norm > config.grad_norm_factor * guard.grad_norm)
    spike = finite & high & (guard.taken >= config.window) & (config.action != "off")
    taken = finite & ~spike
    # a plain mean at first, then an exponential one
    rate = 1.0 / jnp.minimum(guard.taken + 1, config.window)
    difference = loss - guard.loss
    after = Guard(
        taken=guard.taken + 1,
        loss=guard.loss + rate * difference,
        variance=(1 - rate) * (guard.variance + rate * difference**2),
        grad_norm=guard.grad_norm + rate * (grad_norm - guard.grad_norm),
        refused=jnp.zeros_like(guard.refused),
    )
    refused = guard._replace(refused=guard.refused + 1)
    return taken, spike, jax.tree.map(lambda x, y: jnp.where(taken, x, y), after, refused)


def raise_refused(
    config: GuardConfig, *, step: int, spike: bool, refused: int, loss: float, grad_norm: float
) -> None:
    """Ends the run where the configuration says so.

    Args:
      config: of the guard.
      step: the step just computed.
      spike: whether it was refused as a spike.
      refused: steps refused one after the other, this one included.
      loss: of the step.
      grad_norm: of the step.

    Raises:
      DivergedError: a spike with the action "stop", or too many refused steps.
    """
    if spike and config.action == "stop":
        raise DivergedError(
            f"guard: expected a loss within {config.loss_deviations:g} standard deviations above "
            f"its running mean and a gradient norm within {config.grad_norm_factor:g} times its "
            f"own, got loss {loss:.4g} and norm {grad_norm:.4g} at step {step}; "
            "--guard.action skip leaves such steps out",
            step=step,
        )
    if refused >= config.patience:
        raise DivergedError(
            f"guard: expected fewer than {config.patience} refused steps in a row "
            f"(guard.patience), got as many at step {step}, the last with loss {loss:.4g} and "
            f"gradient norm {grad_norm:.4g}; a lower learning rate or other data may help",
            step=step,
        )

"""Each device with the tokens that it holds, and one sum over all of them.

The partitioner of `jax.jit` adds gradients up where they arise, in every micro-batch. So the axes
that cut nothing but the batch, `data` and `context`, are those of a `jax.shard_map`: inside it a
device has the gradient of its own tokens, and it is said when they are added up. The axes `fsdp`
and `tensor` stay with the partitioner.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from mdn_jax.layers.sharding import CONTEXT, DATA

_AXES = (DATA, CONTEXT)


class OwnTokens:
    """What a function of a batch does where each device has its own tokens.

    Args:
      mesh: of the devices; None: the whole batch is there, and all of this does nothing.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self._axes: frozenset[str] = frozenset()
        if mesh is None or mesh.shape[DATA] * mesh.shape[CONTEXT] == 1:
            return
        # with those of one device: nothing is left to the partitioner that need not be
        alone = (name for name, size in mesh.shape.items() if size == 1)
        self._axes = frozenset((*_AXES, *alone))

    def on_each[R](self, function: Callable[[Any, Any], R]) -> Callable[[Any, Any], R]:
        """The function on every device, under the ambient mesh.

        Args:
          function: of a pytree that is the same for all tokens, and of a batch `[B, T]`; its
            results are the same on all devices, by `together`. Gradients that are taken in it are
            those of the device's own tokens.
        """
        if not self._axes:
            return function

        def run(whole: Any, batch: Any) -> R:
            result: R = jax.shard_map(
                function,
                in_specs=(PartitionSpec(), PartitionSpec(*_AXES)),
                out_specs=PartitionSpec(),
                axis_names=self._axes,
                check_vma=False,  # JAX 0.12 cannot differentiate a shard_map inside one with it
            )(whole, batch)
            return result

        return run

    def together[Tree](self, tree: Tree) -> Tree:
        """The sum over all devices of what each has of its own tokens."""
        if not self._axes:
            return tree
        if jax.default_backend() != "cpu":
            return lax.psum(tree, _AXES)
        # XLA for CPUs ends the process where the partitioner has axes too and these are bfloat16
        wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), lax.psum(wide, _AXES), tree)

    def summed_gradient[Tree](self, tree: Tree) -> Tree:
        """The same arrays, whose gradient is added up over all devices as soon as it is there."""
        if not self._axes:
            return tree

        @jax.custom_vjp
        def same(tree: Tree) -> Tree:
            return tree

        same.defvjp(lambda tree: (tree, None), lambda _, gradient: (self.together(gradient),))
        return jax.tree.map(same, tree)

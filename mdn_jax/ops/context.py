"""Context parallelism: the tokens of a row over the devices of a mesh axis, exactly.

A rule is linear in its states: over a stretch of steps the states `X`, stacked along their rows to
`[R, V]`, become `Phi X + U`, with one `Phi` `[R, R]` for all columns. (Momentum delta rule: `X` is
`[S; M]` and `R = 2 K`. Gated rules: `R = K`.) Each device finds `Phi` and `U` of its stretch, all
gather them, a scan over the stretches before its own gives each its entering states, and then each
runs its stretch from there. The backward pass goes the other way round: with `D` the gradient of
the entering states by what the device itself returns, `G_in = D + Phi^T G_out`.

Nothing is approximated. What is exchanged does not grow with the length of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_WIDEST = 512
"""Columns of one call: the most that the GPU kernels take."""

Rule = Callable[..., tuple[Array, Any]]


class Seams(NamedTuple):
    """What documents let through at a device; None: there are none, and all is let through."""

    enters: Bool[Array, " B"] | None  # its first step continues the document before it
    passes: Bool[Array, " B"] | None  # and no document starts later


def over_context[State](
    rule: Callable[..., tuple[Array, State]],
    axis: str,
    arrays: dict[str, Any],
    *,
    initial_state: State,
    segment_ids: Int[Array, "B T"] | None,
    summary: Rule | None = None,
    exchanging: Rule | None = None,
) -> tuple[Float[Array, "B T HV V"], State]:
    """A rule on rows whose tokens are cut over a mesh axis, inside `jax.shard_map`.

    Args:
      rule: of arrays by name, `initial_state` and `segment_ids`; linear in its states, with the
        same map for every column.
      axis: name of the mesh axis; its devices hold equal stretches, in order.
      arrays: what is differentiated, `v` `[B, T, HV, V]` among them: this device's stretch.
      initial_state: states `[B, HV, K, V]`; those of the axis' first device count.
      segment_ids: document of each step of the stretch, comparable with its neighbours'.
      summary: the rule as it is run for `Phi`, on other numbers of columns; None: `rule`.
      exchanging: the rule that finds `Phi` and `U` itself, and also takes `exchange` (`Stretches`)
        and the `seams` for it; None: there is none.

    Returns:
      The stretch's outputs, and the final state of the axis' last device, on every device.

    Raises:
      ValueError: an axis that no surrounding `jax.shard_map` has.
    """
    count = context_size(axis)
    inputs = varying((arrays, initial_state, segment_ids), axes=(axis,))
    if count == 1:
        o, state = rule(**inputs[0], initial_state=inputs[1], segment_ids=inputs[2])
    elif exchanging is not None:
        given, ids = _of_first_device(inputs[1], axis), inputs[2]
        o, state = exchanging(
            **inputs[0],
            initial_state=given,
            segment_ids=ids,
            exchange=Stretches(axis),
            seams=_seams(ids, axis),
        )
    else:
        o, state = _linked(rule, summary or rule, axis)(*inputs)
    return o, of_last_device(state, axis)


def context_size(axis: str) -> int:
    """Devices along a mesh axis that a surrounding `jax.shard_map` has.

    Raises:
      ValueError: it has none of this name.
    """
    try:
        return lax.axis_size(axis)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            "context_axis: expected None or the name of a mesh axis of a surrounding "
            f"jax.shard_map, got {axis!r}"
        ) from None


def from_previous[Tree](x: Tree, axis: str) -> Tree:
    """The arrays of the device before this one along the axis; zeros on the first."""
    steps = [(i, i + 1) for i in range(context_size(axis) - 1)]
    return jax.tree.map(lambda y: lax.ppermute(y, axis, steps), x)


def of_last_device[Tree](tree: Tree, axis: str) -> Tree:
    """The arrays of the axis' last device, on every device."""
    last = lax.axis_index(axis) == context_size(axis) - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(last, x, jnp.zeros_like(x)), axis), tree)


def continues(segment_ids: Int[Array, "B T"], axis: str) -> Bool[Array, " B"]:
    """Whether a stretch's first step is of the document of the step before it.

    On the axis' first device it is: what is given with a row continues its first document.
    """
    same = segment_ids[:, 0] == from_previous(segment_ids[:, -1], axis)
    return same | (lax.axis_index(axis) == 0)


def varying[Tree](tree: Tree, *like: Any, axes: tuple[str, ...] = ()) -> Tree:
    """All arrays as they differ over every mesh axis that one of them differs over.

    Inside `jax.shard_map` an array that is the same on the devices of an axis has another type than
    one that differs, and its gradient is the sum over these devices.

    Args:
      tree: the arrays.
      *like: others, whose axes count too.
      axes: more axes.
    """

    def axes_of(x: Any) -> frozenset[str]:
        return frozenset(jax.typeof(x).manual_axis_type.varying)

    everywhere = set(axes).union(*map(axes_of, jax.tree.leaves((tree, like))))
    if not everywhere:
        return tree

    def cast(x: Array) -> Array:
        new = everywhere - axes_of(x)
        return lax.pcast(x, tuple(sorted(new)), to="varying") if new else x

    return jax.tree.map(cast, tree)


def _linked(rule: Rule, summary: Rule, axis: str) -> Callable[..., tuple[Array, Any]]:
    """The rule from the entering states that the stretches before leave; returns its own final."""
    stretches = Stretches(axis)

    def enter(arrays: dict[str, Any], state: Any, ids: Array | None) -> tuple[Any, Array, Seams]:
        seams = _seams(ids, axis)
        phi, u = stretch_map(summary, arrays, state, ids)
        entering = stretches.entering(phi, u, _stacked(state), seams)
        return _unstacked(entering, state), phi, seams

    @jax.custom_vjp
    def run(arrays: dict[str, Any], state: Any, ids: Array | None) -> tuple[Array, Any]:
        entering, *_ = enter(arrays, state, ids)
        return rule(**arrays, initial_state=entering, segment_ids=ids)

    def forward(arrays: dict[str, Any], state: Any, ids: Array | None) -> tuple[Any, Any]:
        entering, phi, seams = enter(arrays, state, ids)
        outputs, pull = jax.vjp(
            lambda arrays, state: rule(**arrays, initial_state=state, segment_ids=ids),
            arrays,
            entering,
        )
        return outputs, (pull, phi, seams)

    def backward(residuals: Any, cotangents: tuple[Array, Any]) -> tuple[Any, Any, None]:
        pull, phi, seams = residuals
        d_o, d_final = cotangents
        own = _stacked(pull((d_o, d_final))[1])  # its gradients of arrays are not computed
        leaving = stretches.leaving(phi, own, seams)
        d_final = jax.tree.map(jnp.add, d_final, _unstacked(leaving, d_final))
        d_arrays, d_entering = pull((d_o, d_final))
        first = lax.axis_index(axis) == 0
        return d_arrays, jax.tree.map(lambda x: jnp.where(first, x, 0), d_entering), None

    run.defvjp(forward, backward)
    return run


def _seams(ids: Int[Array, "B T"] | None, axis: str) -> Seams:
    if ids is None:
        return Seams(None, None)
    enters = continues(ids, axis)
    return Seams(enters, enters & jnp.all(ids[:, 1:] == ids[:, :-1], axis=1))


def _let_through(mask: Bool[Array, " B"] | None, x: Array) -> Array:
    """Zero where a document starts: selected, for zero times nan is nan."""
    return x if mask is None else jnp.where(mask[:, None, None, None], x, 0)


def stretch_map(
    rule: Rule, arrays: dict[str, Any], state: Any, ids: Array | None
) -> tuple[Float[Array, "B HV R R"], Float[Array, "B HV R V"]]:
    """`Phi` and `U` of a stretch: the states after it from the identity, and from zero."""
    v, like = arrays["v"], _stacked(state)
    *heads, rows, columns = like.shape
    # made of arrays, so that they differ over the mesh axes that these differ over
    eye = jnp.zeros_like(like, shape=(*heads, rows, rows)) + jnp.eye(rows, dtype=like.dtype)
    nothing = jnp.zeros_like(v, shape=(*v.shape[:3], rows))

    def final(v: Array, entering: Array) -> Array:
        states = _unstacked(entering, state)
        return _stacked(rule(**arrays | {"v": v}, initial_state=states, segment_ids=ids)[1])

    if rows + columns > _WIDEST:
        return final(nothing, eye), final(v, jnp.zeros_like(like))
    entering = jnp.concatenate([jnp.zeros_like(like), eye], axis=-1)
    after = final(jnp.concatenate([v, nothing], axis=-1), entering)
    return after[..., columns:], after[..., :columns]


@dataclass(frozen=True)
class Stretches:
    """How the stretches of rows over a mesh axis learn of each other: all gather their maps.

    Attributes:
      axis: of a surrounding `jax.shard_map`.
    """

    axis: str

    def entering(
        self,
        phi: Float[Array, "B HV R R"],
        u: Float[Array, "B HV R V"],
        given: Float[Array, "B HV R V"],
        seams: Seams,
    ) -> Float[Array, "B HV R V"]:
        """The states before this device's stretch, by a scan over the stretches before it."""
        index = lax.axis_index(self.axis)
        phi = _let_through(seams.enters, phi)
        u = jnp.where(index == 0, _let_through(seams.passes, _product(phi, given)) + u, u)
        stretches = lax.all_gather((phi, u, seams.passes), self.axis)

        def step(
            carry: tuple[Array, Array], x: tuple[Any, ...]
        ) -> tuple[tuple[Array, Array], None]:
            before, mine = carry
            phi, u, passes, device = x
            after = _let_through(passes, _product(phi, before)) + u
            return (after, jnp.where(device + 1 == index, after, mine)), None

        earlier = jax.tree.map(lambda x: x[:-1], stretches)
        devices = jnp.arange(context_size(self.axis) - 1)
        (_, mine), _ = lax.scan(step, (jnp.zeros_like(u), given), (*earlier, devices))
        return _let_through(seams.enters, mine)

    def leaving(
        self, phi: Float[Array, "B HV R R"], own: Float[Array, "B HV R V"], seams: Seams
    ) -> Float[Array, "B HV R V"]:
        """The gradient of the states after this device's stretch by the stretches behind it."""
        index = lax.axis_index(self.axis)
        stretches = lax.all_gather((phi, own, seams), self.axis)

        def step(
            carry: tuple[Array, Array], x: tuple[Any, ...]
        ) -> tuple[tuple[Array, Array], None]:
            after, mine = carry
            phi, own, seams, device = x
            through = _let_through(seams.passes, _product(jnp.swapaxes(phi, -1, -2), after))
            before = _let_through(seams.enters, own + through)
            return (before, jnp.where(device == index + 1, before, mine)), None

        later = jax.tree.map(lambda x: x[1:], stretches)
        devices = jnp.arange(1, context_size(self.axis))
        zeros = jnp.zeros_like(own)
        (_, mine), _ = lax.scan(step, (zeros, zeros), (*later, devices), reverse=True)
        return mine


def _of_first_device[Tree](tree: Tree, axis: str) -> Tree:
    """The arrays, whose gradient is that of the axis' first device."""

    @jax.custom_vjp
    def same(tree: Tree) -> Tree:
        return tree

    def backward(_: None, gradient: Tree) -> tuple[Tree]:
        first = lax.axis_index(axis) == 0
        return (jax.tree.map(lambda x: jnp.where(first, x, 0), gradient),)

    same.defvjp(lambda tree: (tree, None), backward)
    result: Tree = same(tree)
    return result


_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _stacked(state: Any) -> Float[Array, "B HV R V"]:
    return jnp.concatenate(jax.tree.leaves(state), axis=2)


def _unstacked(x: Float[Array, "B HV R _"], like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, jnp.split(x, len(leaves), axis=2))

"""Parameters that training leaves as they are, by patterns of their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax

from mdn_jax.errors import RunError
from mdn_jax.saved.model import Params


def frozen_mask(params: Params, patterns: Sequence[str]) -> Params | None:
    """Which parameters patterns freeze, as a tree of bools; None: there are no patterns.

    A pattern is a name with dots, or the beginning of one up to a dot; `*` stands for anything:
    "embeddings", "layers.0", "layers.*.mlp", "*.conv1d".

    Args:
      params: of the model, or their shapes.
      patterns: of the parameters to freeze.

    Raises:
      RunError: a pattern that matches nothing, or patterns that leave nothing to train.
    """
    if not patterns:
        return None
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            tops = sorted({".".join(name.split(".")[:3]) for name in names})
            more = ", ..." if len(tops) > 12 else ""
            raise RunError(
                f"optimizer.frozen: expected a pattern that matches parameters "
                f"({', '.join(tops[:12])}{more}), got {pattern!r}, which matches none"
            )
    frozen = {name for name in names if any(_matches(name, pattern) for pattern in patterns)}
    if len(frozen) == len(names):
        raise RunError(
            f"optimizer.frozen: expected patterns that leave something to train, got "
            f"{list(patterns)}, which match all parameters"
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in frozen, params)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def without_frozen(
    optimizer: optax.GradientTransformation, frozen: Params | None
) -> optax.GradientTransformation:
    """The optimizer of the other parameters: those that are frozen have no moments."""
    if frozen is None:
        return optimizer
    labels = jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen)
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def held(params: Params, frozen: Params | None) -> Params:
    """The same parameters, of which the frozen ones have no gradient, which is not computed."""
    if frozen is None:
        return params
    return jax.tree.map(
        lambda x, is_frozen: jax.lax.stop_gradient(x) if is_frozen else x, params, frozen
    )


def kept(new: Params, old: Params, frozen: Params | None) -> Params:
    """The new parameters, and of the frozen ones the old: bit for bit, denormal or not."""
    if frozen is None:
        return new
    return jax.tree.map(lambda x, y, is_frozen: y if is_frozen else x, new, old, frozen)

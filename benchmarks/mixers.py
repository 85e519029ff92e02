"""`python -m benchmarks mixers`: the other mixers' fast paths against their definitions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

from benchmarks.reference import widen
from mdn_jax import momentum_delta_rule
from mdn_jax.layers.attend import Tokens, attend, fused_implementation
from mdn_jax.ops import (
    TrapezoidalState,
    gated_delta_rule,
    gated_delta_rule_2,
    gated_linear_attention,
    kimi_delta_rule,
    trapezoidal_linear_attention,
)
from mdn_jax.ops.gated.api import GatedImplementation
from mdn_jax.testing import random_inputs, relative_errors

LIMIT = 2e-2
"""Largest relative error: whether they compute the same, not how well."""

FIXED = ("segment_ids",)

PATHS: tuple[tuple[str, GatedImplementation, Callable[..., Any]], ...] = (
    ("GDN", "mosaic_gpu", gated_delta_rule),
    ("GDN", "pallas_triton", gated_delta_rule),
    ("Comba", "pallas_triton", gated_delta_rule),
    ("KDA", "mosaic_gpu", kimi_delta_rule),
    ("Mamba-2", "mosaic_gpu", gated_linear_attention),
    ("GDN-2", "xla", gated_delta_rule_2),
    ("Mamba-3", "xla", trapezoidal_linear_attention),
    ("Titans", "pallas_triton", momentum_delta_rule),
)
"""Of the rules but MDN's: mixer, implementation, rule."""


@dataclass(frozen=True)
class MixersConfig:
    """Outputs and gradients of every fast path in bfloat16, against the definition in float32."""

    length: int = 200
    """Steps; once as one document, once as three."""
    heads: int = 2
    """Key heads."""
    key_dim: int = 128
    """Width of a key head; softmax attention has half of it."""


class Call(NamedTuple):
    """A fast path and what it must equal.

    Attributes:
      name: mixer, implementation, what is special.
      fast: takes the inputs.
      definition: the same in float32.
      inputs: arrays by name, bfloat16.
    """

    name: str
    fast: Callable[..., Any]
    definition: Callable[..., Any]
    inputs: dict[str, Any]


def mixers(config: Annotated[MixersConfig, tyro.conf.arg(name="")]) -> None:
    """Prints the largest error of each path; fails if one is too large or a path breaks."""
    if jax.default_backend() != "gpu":
        raise SystemExit("the fast paths expect a CUDA GPU as the default device, got none")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; limit {LIMIT:g}")
    wrong = []
    for call in calls(config):  # not in threads: XLA's autotuner fails when several run at once
        try:
            error = _largest_error(call)
            print(f"{call.name}: {error:.1e}", flush=True)
        except Exception as failure:  # of any kind: the other paths still count
            first = (str(failure).strip().splitlines() or [""])[0][:300]
            print(f"{call.name}: {type(failure).__name__}: {first}", flush=True)
            error = float("inf")
        if not error <= LIMIT:
            wrong.append(call.name)
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


def calls(config: MixersConfig) -> Iterator[Call]:
    """Every path, whether it can run here or not."""
    for documents in (1, 3):
        packed = ", packed" if documents > 1 else ""
        for mixer, implementation, rule in PATHS:
            yield Call(
                f"{mixer}, {implementation}{packed}",
                partial(rule, implementation=implementation),
                partial(rule, implementation="scan"),
                _gated_inputs(config, mixer, documents),
            )
        for window in (None, 64):
            name = "attention, cuDNN" + (f", window {window}" if window else "") + packed
            run = partial(_attention, window=window)
            inputs = _attention_inputs(config, documents)
            yield Call(name, partial(run, fused=True), partial(run, fused=False), inputs)
    many = [_momentum_inputs(config, seed) for seed in (0, 1, 2)]
    yield Call(
        "MDN, pallas_triton under vmap",
        lambda **arrays: _vmapped("pallas_triton", arrays),
        lambda **arrays: _vmapped("scan", arrays),
        jax.tree.map(lambda *xs: jnp.stack(xs), *many),
    )


def _largest_error(call: Call) -> float:
    arrays = {name: x for name, x in call.inputs.items() if name not in FIXED}
    fixed = {name: x for name, x in call.inputs.items() if name in FIXED}

    def run(function: Callable[..., Any], arrays: Any, cotangent: Any) -> Any:
        outputs, pull = jax.vjp(lambda arrays: function(**arrays, **fixed), arrays)
        like = jax.tree.map(lambda x, y: x.astype(y.dtype), cotangent, outputs)
        return outputs, pull(like)

    rng = np.random.default_rng(1)
    cotangent = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype),
        jax.eval_shape(lambda: call.definition(**call.inputs)),
    )
    actual = jax.jit(partial(run, call.fast))(arrays, cotangent)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(partial(run, call.definition))(widen(arrays), cotangent)
    return max(relative_errors(actual, expected).values())


def _gated_inputs(config: MixersConfig, mixer: str, documents: int) -> dict[str, Any]:
    """Shapes of the published layers: wide values, none so wide in KDA, many heads in Mamba."""
    key_dim = config.key_dim
    heads = 1 if mixer == "Mamba-2" else config.heads
    widths = {"KDA": key_dim, "GDN-2": key_dim, "Mamba-2": key_dim // 2, "Mamba-3": key_dim // 2}
    inputs: dict[str, Any] = random_inputs(
        seed=2,
        length=config.length,
        heads=heads,
        value_heads=4 if mixer == "Mamba-2" else heads,
        key_dim=key_dim,
        value_dim=widths.get(mixer, 2 * key_dim),
        dtype=jnp.bfloat16,
        documents=documents,
    )
    state: Any = inputs["initial_state"]
    if mixer == "Titans":  # a step size of 1, and the key itself as the erase key
        return inputs | {"p": _unit(inputs["k"], 1.0), "beta": jnp.ones_like(inputs["beta"])}
    names = ("q", "k", "v", "log_alpha", "beta", *FIXED)
    kept: dict[str, Any] = {name: inputs[name] for name in names if name in inputs}
    kept["initial_state"] = state.s
    rng = np.random.default_rng(3)
    if mixer in ("KDA", "GDN-2"):  # a decay of each key channel
        factors = jnp.asarray(rng.uniform(0.5, 1, key_dim), jnp.float32)
        kept["log_alpha"] = kept["log_alpha"][..., None] * factors
    if mixer == "GDN-2":
        del kept["beta"]
        for name, like in (("b", kept["k"]), ("w", kept["v"])):
            kept[name] = jnp.asarray(rng.random(like.shape), jnp.float32)
    if mixer == "Mamba-3":  # every value head has a key head of its own
        kept["dt"], shape = kept.pop("beta"), kept["v"].shape
        kept["lam"] = jnp.asarray(rng.random(shape[:3]), jnp.float32)
        kept["angles"] = jnp.asarray(rng.normal(size=(*shape[:3], key_dim // 4)), jnp.float32)
        last = (kept["k"][:, 0].astype(jnp.float32), kept["v"][:, 0].astype(jnp.float32))
        kept["initial_state"] = TrapezoidalState(state.s, *last)
    if mixer in ("Mamba-2", "Mamba-3"):  # their keys are not normalised
        kept["k"] = (kept["k"] * key_dim**-0.5).astype(jnp.bfloat16)
    if mixer == "Comba":
        kept["p"] = _unit(kept["k"], 0.7)
    return kept


def _unit(k: Array, length: float) -> Array:
    """The keys, all of this length."""
    wide = k.astype(jnp.float32)
    unit = wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
    return (length * unit).astype(k.dtype)


def _attention_inputs(config: MixersConfig, documents: int) -> dict[str, Any]:
    inputs = random_inputs(
        seed=4,
        length=config.length,
        heads=config.heads,
        value_heads=config.heads,
        key_dim=config.key_dim // 2,
        value_dim=config.key_dim // 2,
        dtype=jnp.bfloat16,
        documents=documents,
    )
    return {name: inputs[name] for name in ("q", "k", "v", *FIXED) if name in inputs}


def _attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None = None,
    *,
    window: int | None,
    fused: bool,
) -> Array:
    packed = segment_ids is not None
    documents = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    if fused and fused_implementation(q, k, packed=packed) is None:
        raise ValueError("cuDNN cannot run it here")
    places = Tokens(jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2]), documents)
    return attend(q, k, v, places, places, window, packed=packed)


def _momentum_inputs(config: MixersConfig, seed: int) -> dict[str, Any]:
    return random_inputs(
        seed=seed,
        batch=1,
        length=config.length,
        heads=config.heads,
        key_dim=config.key_dim // 2,
        value_dim=config.key_dim,
        dtype=jnp.bfloat16,
    )


def _vmapped(implementation: Any, arrays: dict[str, Any]) -> Any:
    return jax.vmap(lambda arrays: momentum_delta_rule(**arrays, implementation=implementation))(
        arrays
    )

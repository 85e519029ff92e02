"""How far states that are kept in 16 bits drift from float64 along a text."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax import lax
from jaxtyping import Array
from numpy.typing import NDArray
from tabulate import tabulate

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.layers.gates import MomentumGates
from mdn_jax.ops.replay import replay_state, replay_steps
from mdn_jax.ops.state import STATE_DTYPES, StateDtype, keep

GateName = Literal["published", "stable", "slow", "faint"]
_HIDDEN, _PIECE = 1024, 5000
_SLOWER = _LESS = 100.0


@dataclass(frozen=True)
class DriftConfig:
    """Relative errors of outputs against float64, one token at a time, states rounded in between.

    Gates are those of freshly initialised layers on inputs N(0, 1), every head with parameters of
    its own: "published"; "stable", without the published bounds; "slow", which is "stable" with
    decays a hundredth as fast; and "faint", which is "slow" with a hundredth of its step sizes.
    q, k and v are N(0, 1), float32.
    """

    length: int = 100_000
    """Tokens."""
    heads: int = 8
    """Heads of each kind of gates."""
    key_dim: int = 32
    """K."""
    value_dim: int = 16
    """V."""
    gates: tuple[GateName, ...] = ("published", "stable", "slow", "faint")
    """Kinds of gates."""
    state_dtypes: tuple[StateDtype, ...] = STATE_DTYPES
    """How states are kept."""
    replay: int = 8
    """Tokens between two writes, beside a write with every token."""
    windows: int = 100
    """Stretches of the text whose errors are told apart."""
    seed: int = 0
    """Of everything."""
    output: Path | None = None
    """Where to write the results as JSON."""


class Curve(NamedTuple):
    """Errors of one way of keeping states.

    Attributes:
      gates: kind of gates.
      state_dtype: of the states.
      replay: tokens between two writes.
      errors: relative, of each window and head.
    """

    gates: GateName
    state_dtype: StateDtype
    replay: int
    errors: NDArray[np.float64]


def drift(config: Annotated[DriftConfig, tyro.conf.arg(name="")]) -> None:
    """Table and JSON of the errors along the text."""
    if config.length % config.windows or config.length < 10 * config.windows:
        raise SystemExit(
            f"length: expected a multiple of windows = {config.windows}, ten times as long or "
            f"more, got {config.length}"
        )
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}; {config.length} tokens, {config.heads} heads of "
        f"{config.key_dim} x {config.value_dim}; relative error of outputs against float64, median "
        "head / worst head, of a hundredth of the text"
    )
    curves = [curve for name in config.gates for curve in measure(config, name)]
    print(table(config, curves))
    if config.output:
        options = asdict(config)
        del options["output"]
        lines = ",\n".join(json.dumps(record(curve)) for curve in curves)
        head = f'"device": {json.dumps(device)},\n"config": {json.dumps(options)}'
        config.output.write_text(f'{{{head},\n"curves": [\n{lines}\n]}}\n')


def record(curve: Curve) -> dict[str, Any]:
    """A curve for JSON, with two digits of its errors."""
    numbers = {"median": np.median(curve.errors, axis=1), "worst": np.max(curve.errors, axis=1)}
    rounded = {name: [float(f"{x:.1e}") for x in values] for name, values in numbers.items()}
    return {
        "gates": curve.gates,
        "state_dtype": curve.state_dtype,
        "replay": curve.replay,
        **rounded,
    }


def measure(config: DriftConfig, name: GateName) -> list[Curve]:
    """All ways of keeping states with one kind of gates."""
    inputs = _inputs(config, name)
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(x, jnp.float64) for n, x in inputs.items()}
        o, _ = jax.jit(partial(momentum_delta_rule, implementation="scan"))(**wide)
        expected = np.asarray(o[0])
    curves = []
    for dtype in config.state_dtypes:
        for replay in (1, config.replay):
            actual = np.asarray(_decoded(inputs, dtype, replay), np.float64)
            curves.append(Curve(name, dtype, replay, _errors(config, actual, expected)))
    return curves


def gates_of(name: GateName, heads: int, length: int, *, seed: int) -> dict[str, Array]:
    """Gates `[1, length, heads]` of freshly initialised heads on inputs N(0, 1)."""
    make = MomentumGates(
        _HIDDEN,
        heads,
        min_log_mu=-2.0,
        tau_factor=1.0,
        bound="published" if name == "published" else "stable",
        rngs=nnx.Rngs(seed),
    )
    if name in ("slow", "faint"):
        make.a_log[...] -= np.log(_SLOWER)
    graph, state = nnx.split(make)

    @jax.jit
    def piece(state: Any, key: Array) -> Any:
        x = jax.random.normal(key, (1, _PIECE, _HIDDEN), jnp.float32)
        return nnx.merge(graph, state)(x)._asdict()

    keys = jax.random.split(jax.random.key(seed + 1), -(-length // _PIECE))
    pieces = [piece(state, key) for key in keys]
    gates = {n: jnp.concatenate([x[n] for x in pieces], axis=1)[:, :length] for n in pieces[0]}
    return gates | {"beta": gates["beta"] / _LESS} if name == "faint" else gates


def _inputs(config: DriftConfig, name: GateName) -> dict[str, Array]:
    shape = (1, config.length, config.heads)
    rng = np.random.default_rng(config.seed)
    widths = {"q": config.key_dim, "k": config.key_dim, "v": config.value_dim}
    arrays = {
        n: jnp.asarray(rng.standard_normal((*shape, width), np.float32))
        for n, width in widths.items()
    }
    return arrays | gates_of(name, config.heads, config.length, seed=config.seed)


def _decoded(inputs: dict[str, Array], dtype: StateDtype, replay: int) -> Array:
    """Outputs `[length, heads, V]`, one token at a time."""
    heads, key_dim = inputs["q"].shape[2:]
    value_dim = inputs["v"].shape[3]
    start = keep(MDNState.zeros(1, heads, key_dim, value_dim), dtype)
    if replay > 1:
        run: Callable[..., Any] = jax.jit(partial(replay_steps, implementation="xla"))
        o: Array = run(**inputs, initial_state=replay_state(start, replay))[0]
        return o[0]

    @jax.jit
    def each(inputs: dict[str, Array], start: Any) -> Array:
        def step(state: Any, x: dict[str, Array]) -> tuple[Any, Array]:
            one: dict[str, Any] = {n: y[:, None] for n, y in x.items()}
            o, state = momentum_delta_rule(**one, initial_state=state, implementation="xla")
            return state, o[0, 0]

        time_first = {n: jnp.moveaxis(x, 1, 0) for n, x in inputs.items()}
        return lax.scan(step, start, time_first)[1]

    outputs: Array = each(inputs, start)
    return outputs


def _errors(
    config: DriftConfig, actual: NDArray[np.float64], expected: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of each window and head, in the Frobenius norm."""

    def size(x: NDArray[np.float64]) -> NDArray[np.float64]:
        windows = x.reshape(config.windows, -1, *x.shape[1:])
        norms: NDArray[np.float64] = np.sqrt(np.sum(windows**2, axis=(1, 3)))
        return norms

    return size(actual - expected) / size(expected)


def table(config: DriftConfig, curves: list[Curve]) -> str:
    """One row a kind of gates and way of keeping; columns: the place in the text."""
    places = [0, config.windows // 10 - 1, config.windows // 2 - 1, config.windows - 1]
    step = config.length // config.windows
    lines = [
        [
            curve.gates,
            curve.state_dtype,
            curve.replay,
            *(f"{np.median(curve.errors[n]):.1e} / {np.max(curve.errors[n]):.1e}" for n in places),
        ]
        for curve in curves
    ]
    ends = [f"to {(n + 1) * step:,}" for n in places]
    headers = ["gates", "states", "written every", *ends]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)

"""Where the published closed form of the coefficients loses precision, and where this one does."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.closed_form import chunk_rule, closed_form, without_cancellation
from benchmarks.gate_draws import REGIMES, Gates, published_gates
from benchmarks.numerics_errors import Errors
from mdn_jax import MDNState, momentum_delta_rule

CHUNK = 64
QUANTITIES = ("o", "S", "d log_alpha", "d log_mu", "d beta")
FORMS = ("closed form", "mdn_jax")


@dataclass(frozen=True)
class NumericsConfig:
    """Errors of outputs, states and gradients of gates against the float64 recurrence.

    The published closed form of the coefficients and the library's, in the same chunk algorithm,
    chunks of 64. q, k, v have the dtype, gates and coefficients are float32.
    """

    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of q, k and v."""
    heads: int = 64
    """Heads of every regime."""
    length: int = 64
    """Tokens, a multiple of 64."""
    width: int = 32
    """Of keys and values."""
    draws: int = 2048
    """Heads of each published initialisation whose coefficients are compared."""
    seed: int = 0
    """Of everything."""
    output_dir: Path = Path("runs/numerics")
    """Directory of numerics.json and numerics.png."""


def numerics(config: Annotated[NumericsConfig, tyro.conf.arg(name="")]) -> None:
    """Table, JSON and figure of the errors of both forms in every gate regime."""
    from benchmarks.numerics_figure import draw  # matplotlib is not needed for anything else here

    if config.length % CHUNK or min(config.length, config.heads, config.width, config.draws) < 1:
        raise SystemExit(
            f"length: expected a multiple of {CHUNK}, and sizes of at least 1, got {config}"
        )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        rows = [x for dtype in config.dtypes for x in measure(config, dtype)]
        shares = {name: wrong_share(config, name) for name in ("400M", "1.3B")}
    print(f"relative error, median head / worst head; {device()}, chunks of {CHUNK}\n")
    print(table(rows))
    for name, share in shares.items():
        print(
            f"\nat the published {name} initialisation ({config.draws} heads) the closed form has "
            f"gamma wrong by more than 10 % in {share['closed form']:.2%} of the heads, mdn_jax in "
            f"{share['mdn_jax']:.2%}; worst {share['worst closed form']:.1e} and "
            f"{share['worst mdn_jax']:.1e}"
        )
    records = [record(row) for row in rows]
    path = config.output_dir / "numerics.json"
    path.write_text(json.dumps({"rows": records, "initialisations": shares}, indent=1) + "\n")
    draw(rows, config.output_dir / "numerics.png")
    print(f"\n{path}\n{config.output_dir / 'numerics.png'}")


def device() -> str:
    """Kind of the first device."""
    kind: str = jax.devices()[0].device_kind
    return kind


def measure(config: NumericsConfig, dtype: str) -> list[Errors]:
    """Errors of both forms in every regime; under `jax.enable_x64(True)`."""
    rules = {
        "closed form": partial(chunk_rule, coefficients=closed_form, chunk=CHUNK),
        "mdn_jax": partial(momentum_delta_rule, implementation="xla", chunk_size=CHUNK),
    }
    reference = _compiled(partial(momentum_delta_rule, implementation="scan"))
    compiled = {name: _compiled(rule) for name, rule in rules.items()}
    out = []
    for number, (regime, gates) in enumerate(REGIMES.items()):
        rng = np.random.default_rng([config.seed, number])
        inputs, cotangent = _inputs(config, gates, rng, dtype)
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (inputs, cotangent))
        expected = reference(*wide)
        difference = np.asarray(inputs["log_alpha"] - inputs["log_mu"], np.float64)[0]
        nats = difference.reshape(-1, CHUNK, config.heads).sum(1).max(0)
        for form, rule in compiled.items():
            actual = rule(inputs, cotangent)
            errors = {n: _by_head(actual[n], expected[n]) for n in QUANTITIES}
            out.append(Errors(regime, dtype, form, nats, errors))
    return out


def _inputs(
    config: NumericsConfig, gates: Gates, rng: np.random.Generator, dtype: str
) -> tuple[dict[str, Any], Array]:
    shape = (1, config.length, config.heads)
    q, k, v = rng.normal(size=(3, *shape, config.width))
    inputs: dict[str, Any] = {
        n: jnp.asarray(x, dtype) for n, x in zip("qkv", (q, k, v), strict=True)
    }
    inputs |= {n: jnp.asarray(x, jnp.float32) for n, x in gates(rng, shape).items()}
    return inputs, jnp.asarray(rng.normal(size=v.shape), jnp.float32)


def _compiled(rule: Callable[..., Any]) -> Callable[[dict[str, Any], Array], dict[str, Array]]:
    """Outputs, memory and gradients of the gates, heads first; states start from zero."""

    def loss(gates: dict[str, Array], rest: dict[str, Array], cotangent: Array) -> Any:
        *_, heads, width = rest["v"].shape
        state = MDNState.zeros(1, heads, width, width, cotangent.dtype)
        o, state = rule(**rest, **gates, initial_state=state)
        return jnp.sum(o.astype(cotangent.dtype) * cotangent), (o, state.s)

    @jax.jit
    def run(inputs: dict[str, Array], cotangent: Array) -> dict[str, Array]:
        rest = {n: inputs[n] for n in "qkv"}
        gates = {n: x for n, x in inputs.items() if n not in rest}
        gradient, (o, s) = jax.grad(loss, has_aux=True)(gates, rest, cotangent)
        out = {"o": jnp.moveaxis(o, 2, 1), "S": s}
        return out | {f"d {n}": jnp.moveaxis(x, 2, 1) for n, x in gradient.items()}

    return run


def _by_head(actual: Array, expected: Array | NDArray[Any]) -> NDArray[np.float64]:
    a, b = (np.asarray(x, np.float64)[0].reshape(x.shape[1], -1) for x in (actual, expected))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # the largest is taken out: squares of 1e200 are finite in no dtype
        top = np.abs(a - b).max(axis=1)
        error = top * np.linalg.norm((a - b) / np.where(top > 0, top, 1)[:, None], axis=1)
        error = error / np.linalg.norm(b, axis=1)
    return np.where(np.isfinite(error), error, np.nan)


def wrong_share(config: NumericsConfig, name: Literal["400M", "1.3B"]) -> dict[str, float]:
    """Share of the heads of a published initialisation with gamma wrong by more than 10 %.

    In float32, over one chunk, against the recurrence of gamma in float64.
    """
    gates = published_gates(name, config.draws, CHUNK, seed=config.seed)
    log_alpha, log_mu, beta = (gates[n][0].T for n in ("log_alpha", "log_mu", "beta"))
    expected = gamma_by_recurrence(log_alpha, log_mu, beta)
    out: dict[str, float] = {}
    for form, coefficients in zip(FORMS, (closed_form, without_cancellation), strict=True):
        co = jax.jit(coefficients)(
            *(jnp.asarray(x, jnp.float32) for x in (log_alpha, log_mu, beta))
        )
        error = _by_head(co.gamma[None], expected[None])
        out[form] = float(np.mean(~(error <= 0.1)))
        out[f"worst {form}"] = float(error.max())
    return out


def gamma_by_recurrence(
    log_alpha: NDArray[Any], log_mu: NDArray[Any], beta: NDArray[Any]
) -> NDArray[np.float64]:
    """Gamma `[H, C, C]` of gates `[H, C]`: what step j's write has become in the memory at step t.

    The recurrence itself with one write a column, in float64.
    """
    a, m, beta = (np.asarray(x, np.float64) for x in (log_alpha, log_mu, beta))
    alpha, mu = np.exp(a), np.exp(m)
    heads, steps = alpha.shape
    memory, momentum = np.zeros((2, heads, steps))  # a column a write
    out = np.zeros((heads, steps, steps))
    for t in range(steps):
        momentum = mu[:, t, None] * momentum
        momentum[:, t] += 1.0
        memory = alpha[:, t, None] * memory + beta[:, t, None] * momentum
        out[:, t] = memory
    return out


def table(rows: list[Errors]) -> str:
    """One line a regime, dtype and form."""
    lines = [
        [row.regime, row.dtype, row.form, f"{np.median(row.nats):.0f} / {row.nats.max():.0f}"]
        + [_cell(row.errors[name]) for name in QUANTITIES]
        for row in rows
    ]
    headers = ["gates", "q, k, v", "coefficients", "nats a chunk", *QUANTITIES]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _cell(errors: NDArray[np.float64]) -> str:
    """Median and worst head, a head that is not finite being the worst there is."""
    return " / ".join(_text(x) for x in summary(errors))


def _text(x: float) -> str:
    return (
        f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
        if np.isfinite(x)
        else "nan"
    )


def summary(errors: NDArray[np.float64]) -> tuple[float, float]:
    """Errors of the median and of the worst head; nan if that head is not finite."""
    ordered = np.sort(errors)  # nan last
    return float(ordered[len(ordered) // 2]), float(ordered[-1])


def record(row: Errors) -> dict[str, Any]:
    """For JSON; a number that is not finite is null."""

    def finite(values: NDArray[np.float64]) -> list[float | None]:
        return [float(x) if np.isfinite(x) else None for x in values]

    return {
        "gates": row.regime,
        "dtype": row.dtype,
        "coefficients": row.form,
        "nats": finite(row.nats),
        "errors": {name: finite(x) for name, x in row.errors.items()},
    }

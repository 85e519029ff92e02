"""The operator's implementations side by side: correctness first, then time and memory."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.timing import measure
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops.api import Implementation
from mdn_jax.testing import random_inputs, relative_errors

Rule = Callable[..., tuple[Array, MDNState]]

ARRAYS = ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta")
TOLERANCE = {"float32": (1e-4, 5e-4), "bfloat16": (5e-3, 1e-2), "float16": (5e-3, 1e-2)}
"""Largest relative error of outputs and of gradients for a kernel to be timed, by dtype."""


@dataclass(frozen=True)
class KernelsConfig:
    """Times the operator's implementations on random inputs with the layer's gates."""

    shape: tuple[int, int, int, int, int] = (2, 2048, 4, 64, 64)
    """B T H K V."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    implementations: tuple[Implementation, ...] = ("scan", "xla")
    """What to time; times are compared with the first."""
    runs: int = 20
    """Timed runs after the warm-up; the median is shown."""
    output: Path | None = None
    """Where to write the results as JSON."""


def kernels(config: Annotated[KernelsConfig, tyro.conf.arg(name="")]) -> None:
    """Times the operator's implementations; refuses to time one that is wrong."""
    batch, length, heads, key_dim, value_dim = config.shape
    inputs = random_inputs(
        seed=0,
        batch=batch,
        length=length,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=config.dtype,
        initial_state=False,
    )
    arrays = [jnp.asarray(inputs[name]) for name in ARRAYS]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(_forward_and_gradient("scan"))(*_widen(arrays))
    rows = []
    for implementation in config.implementations:
        actual = jax.jit(_forward_and_gradient(implementation))(*arrays)
        _require_correct(implementation, config.dtype, actual, expected)
        rows.append(_time(implementation, arrays, config))
    _report(config, rows)


def _forward(implementation: Implementation) -> Rule:
    def forward(*arrays: Array) -> tuple[Array, MDNState]:
        return momentum_delta_rule(*arrays, implementation=implementation)

    return forward


def _forward_and_gradient(implementation: Implementation) -> Callable[..., object]:
    def both(*arrays: Array) -> object:
        outputs, pullback = jax.vjp(_forward(implementation), *arrays)
        # the outputs themselves as cotangents: random, of every output, and reproducible
        return outputs, pullback(outputs)

    return both


def _widen(arrays: list[Array]) -> list[Array]:
    return [x.astype(jnp.float32) for x in arrays]


def _require_correct(name: str, dtype: str, actual: object, expected: object) -> None:
    errors = relative_errors(actual, expected)
    for path, error in errors.items():
        allowed = TOLERANCE[dtype][int(path.split(".")[0])]
        if error > allowed:
            raise SystemExit(
                f"{name}: relative error {error:.1e} in {path} is above {allowed:.0e}; not timed"
            )


def _time(
    implementation: Implementation, arrays: list[Array], config: KernelsConfig
) -> dict[str, object]:
    forward = measure(_forward(implementation), *arrays, runs=config.runs)
    both = measure(_forward_and_gradient(implementation), *arrays, runs=config.runs)
    return {"implementation": implementation, "forward": asdict(forward), "both": asdict(both)}


def _report(config: KernelsConfig, rows: list[dict]) -> None:
    device = jax.devices()[0]
    print(f"{device.device_kind}; B,T,H,K,V = {config.shape}, {config.dtype}, {config.runs} runs")
    first = rows[0]
    table = []
    for row in rows:
        line = [row["implementation"]]
        for part in ("forward", "both"):
            timing = row[part]
            line += [
                f"{timing['median'] * 1e3:.2f} ± {timing['spread'] * 5e2:.2f}",
                f"{first[part]['median'] / timing['median']:.2f}",
                f"{timing['memory'] / 2**20:.0f}",
                f"{timing['compile']:.1f}",
            ]
        table.append(line)
    columns = ("ms", f"x {first['implementation']}", "MiB", "compile s")
    headers = ["", *(f"forward {c}" for c in columns), *(f"forward+backward {c}" for c in columns)]
    print(tabulate(table, headers=headers, tablefmt="github"))
    if config.output:
        record = {"device": device.device_kind, "config": asdict(config), "results": rows}
        config.output.write_text(json.dumps(record, indent=1, default=str))

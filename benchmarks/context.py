"""The rule with the tokens of its rows over several devices, beside one device."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tabulate import tabulate

from benchmarks.reference import inputs_of
from benchmarks.report import Shape, shape_text
from benchmarks.timing import Timing, how_timed, measure
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops.api import Implementation
from mdn_jax.ops.context import stretch_map
from mdn_jax.testing import (
    LIMITS,
    Inputs,
    Rule,
    outputs_and_gradients,
    random_cotangents,
    relative_errors,
)


@dataclass(frozen=True)
class ContextConfig:
    """Times the rule with each row's tokens over several devices; first it compares with one."""

    shape: Shape = (1, 131072, 2, 128, 256)
    """B T H K V."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of q, k, v."""
    devices: tuple[int, ...] = (2,)
    """How many to cut the tokens over, divisors of T; one device is timed before them."""
    implementation: Implementation | None = None
    """None: the best one."""
    runs: int = 20
    """Timed groups of calls after the warm-up (of one call on a CPU); the median is shown."""
    output: Path | None = None
    """Where to write the results as JSON."""


def context(config: Annotated[ContextConfig, tyro.conf.arg(name="")]) -> None:
    """Times one device and several; refuses to time what differs from one device."""
    length = config.shape[1]
    for count in config.devices:
        if not 1 <= count <= jax.device_count() or length % count:
            raise SystemExit(
                f"devices: expected divisors of T = {length} up to {jax.device_count()}, "
                f"got {count}"
            )
    x = inputs_of(config.shape, dtype=config.dtype, initial_state=False)
    cotangent = random_cotangents(x)
    whole = _rule(config)
    expected = jax.jit(outputs_and_gradients(whole))(x, cotangent)
    timings = {(1, part): _timed(config, whole, part, x, cotangent) for part in ("forward", "both")}
    for count in config.devices:
        rule, place = _over(config, count)
        inputs, cotangents = place(x), (place(cotangent[0]), cotangent[1])
        actual = jax.jit(outputs_and_gradients(rule))(inputs, cotangents)
        worst = max(relative_errors(jax.device_get(actual), jax.device_get(expected)).values())
        if not worst <= LIMITS[config.dtype].gradients:
            raise SystemExit(
                f"relative difference {worst:.1e} of {count} devices from one is above "
                f"{LIMITS[config.dtype].gradients}; not timed"
            )
        for part in ("forward", "both"):
            timings[count, part] = _timed(config, rule, part, inputs, cotangents)
        timings[count, "stretch's map"] = _map_timed(config, count, x)
    _print(config, timings)
    if config.output:
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "config": asdict(config),
            "results": {f"{n} {part}": asdict(timing) for (n, part), timing in timings.items()},
        }
        config.output.write_text(json.dumps(record, indent=1, default=str))


def _rule(config: ContextConfig, axis: str | None = None) -> Rule:
    def rule(**inputs: Any) -> Any:
        return momentum_delta_rule(
            **inputs, implementation=config.implementation, context_axis=axis
        )

    return rule


def _over(config: ContextConfig, count: int) -> tuple[Rule, Any]:
    """The rule over so many devices, and what places its arguments on them."""
    devices = jax.devices()[:count]
    mesh = jax.make_mesh((count,), ("context",), (AxisType.Auto,), devices=devices)
    tokens = PartitionSpec(None, "context")
    sharded = jax.shard_map(
        lambda inputs: _rule(config, "context")(**inputs),
        mesh=mesh,
        in_specs=(tokens,),
        out_specs=(tokens, PartitionSpec()),
    )

    def place(tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, tokens))

    return lambda **inputs: sharded(inputs), place


def _timed(config: ContextConfig, rule: Rule, part: str, x: Inputs, cotangent: Any) -> Timing:
    if part == "forward":
        return measure(lambda x: rule(**x)[0], x, runs=config.runs)
    return measure(outputs_and_gradients(rule), x, cotangent, runs=config.runs)


def _map_timed(config: ContextConfig, count: int, x: Inputs) -> Timing:
    """What is added forward: the map of the states by one device's stretch."""
    batch, length, heads, key_dim, value_dim = config.shape
    stretch = {name: y[:, : length // count] for name, y in x.items()}
    state = MDNState.zeros(batch, heads, key_dim, value_dim)

    def run(stretch: Inputs, state: MDNState) -> Any:
        return stretch_map(lambda **y: _rule(config)(**y), stretch, state, None)

    return measure(run, stretch, state, runs=config.runs)


def _print(config: ContextConfig, timings: dict[tuple[int, str], Timing]) -> None:
    batch, _, heads, key_dim, value_dim = config.shape
    sent = batch * heads * 2 * key_dim * (2 * key_dim + value_dim) * 4
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; "
        f"B,T,H,K,V = {shape_text(config.shape)}, {config.dtype}"
    )
    print(f"{how_timed(config.runs)}; each device sends {sent / 2**20:.3g} MiB a pass")
    rows = []
    for (count, part), timing in timings.items():
        one = timings.get((1, part))
        rows.append(
            [
                count,
                part,
                f"{timing.median * 1e3:.3f}",
                f"{timing.spread * 500:.3f}",
                f"{one.median / timing.median:.2f}" if one else "",
                f"{timing.memory / 2**20:.0f}",
            ]
        )
    headers = ["devices", "pass", "ms", "± ms", "times one", "MiB planned a device"]
    print(tabulate(rows, headers=headers, tablefmt="github"))

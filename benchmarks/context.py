"""The rule with the tokens of its rows over several devices, beside one device."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.reference import repeated_inputs_of
from benchmarks.report import Shape, shape_text
from benchmarks.timing import Compiled, Timing, compile_for, how_timed, measure_compiled
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops.api import Implementation
from mdn_jax.testing import LIMITS, Rule, outputs_and_gradients

Part = Literal["forward", "both"]
PARTS: tuple[Part, ...] = get_args(Part)


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
    threads: int = min(8, os.cpu_count() or 1)
    """Programs that compile at once."""
    runs: int = 10
    """Timed groups of calls after the warm-up (of one call on a CPU); the median is shown."""
    output: Path | None = None
    """Where to write the results as JSON."""


class Case(NamedTuple):
    """What is timed: how many devices, and which pass."""

    devices: int
    part: Part


def context(config: Annotated[ContextConfig, tyro.conf.arg(name="")]) -> None:
    """Times one device and several; refuses to time what differs from one device."""
    length = config.shape[1]
    for count in config.devices:
        if not 1 <= count <= jax.device_count() or length % count:
            raise SystemExit(
                f"devices: expected divisors of T = {length} up to {jax.device_count()}, "
                f"got {count}"
            )
    batch, _, heads, key_dim, value_dim = config.shape
    x = repeated_inputs_of(config.shape, dtype=config.dtype, initial_state=False)
    state = MDNState.zeros(batch, heads, key_dim, value_dim)
    counts = tuple(dict.fromkeys((1, *config.devices)))
    rules = {count: _over(config, count) for count in counts}
    placed = {count: (place(x), (place(x["v"]), state)) for count, (_, place) in rules.items()}
    cases = [Case(count, part) for count in counts for part in PARTS]

    def compiled(case: Case) -> Compiled:
        rule, _ = rules[case.devices]
        if case.part == "forward":
            return compile_for(lambda x: rule(**x)[0], placed[case.devices][0])
        return compile_for(outputs_and_gradients(rule), *placed[case.devices])

    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; "
        f"B,T,H,K,V = {shape_text(config.shape)}, {config.dtype}; {how_timed(config.runs)}",
        flush=True,
    )
    with ThreadPoolExecutor(config.threads) as pool:
        programs = dict(zip(cases, pool.map(compiled, cases), strict=True))
    timings = dict[Case, Timing]()
    expected = programs[Case(1, "both")].call(*placed[1])
    for count in counts:
        if count > 1:
            _check(config, count, programs[Case(count, "both")].call(*placed[count]), expected)
        for part in PARTS:
            case = Case(count, part)
            arguments = placed[count] if part == "both" else placed[count][:1]
            timings[case] = measure_compiled(programs[case], *arguments, runs=config.runs)
            print(f"{count} devices, {part}: {timings[case].median * 1e3:.3f} ms", flush=True)
    _print(config, timings)
    if config.output:
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "config": asdict(config),
            "results": {f"{n} {part}": asdict(timing) for (n, part), timing in timings.items()},
        }
        config.output.write_text(json.dumps(record, indent=1, default=str))


def _check(config: ContextConfig, count: int, actual: Any, expected: Any) -> None:
    """Refuses what is not near enough to one device's, on these devices."""
    limit = LIMITS[config.dtype].gradients
    near = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), expected, actual)
    (o, state), gradients = jax.jit(partial(jax.tree.map, _difference))(actual, near)
    worst = max(float(x) for x in jax.tree.leaves((o, state, gradients)))
    if not worst <= limit:
        raise SystemExit(
            f"relative difference {worst:.1e} of {count} devices from one is above {limit}; "
            "not timed"
        )
    print(f"{count} devices: relative difference from one {worst:.1e}", flush=True)


def _difference(x: Array, y: Array) -> Array:
    """Relative, in the Frobenius norm."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-30)


def _rule(config: ContextConfig, axis: str | None = None) -> Rule:
    def rule(**inputs: Any) -> Any:
        return momentum_delta_rule(
            **inputs, implementation=config.implementation, context_axis=axis
        )

    return rule


def _over(config: ContextConfig, count: int) -> tuple[Rule, Any]:
    """The rule over so many devices, and what places its arguments on them."""
    if count == 1:
        return _rule(config), lambda tree: jax.device_put(tree, jax.devices()[0])
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


def _print(config: ContextConfig, timings: dict[Case, Timing]) -> None:
    batch, _, heads, key_dim, value_dim = config.shape
    sent = batch * heads * 2 * key_dim * (2 * key_dim + value_dim) * 4
    print(f"each device sends {sent / 2**20:.3g} MiB a pass")
    rows = [
        [
            case.devices,
            case.part,
            f"{timing.median * 1e3:.3f}",
            f"{timing.spread * 500:.3f}",
            f"{timings[Case(1, case.part)].median / timing.median:.2f}",
            f"{timing.memory / 2**20:.0f}",
        ]
        for case, timing in timings.items()
    ]
    headers = ["devices", "pass", "ms", "± ms", "times one", "MiB planned a device"]
    print(tabulate(rows, headers=headers, tablefmt="github"))

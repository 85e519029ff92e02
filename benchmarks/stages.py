"""Each GPU kernel of the operator by itself, on what the kernels before it give."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.extend.core import Var
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.costs import STAGES, Cost, StageName, stage_costs
from benchmarks.reference import Results, inputs_of, scan_outputs_and_gradients, worst
from benchmarks.timing import Compiled, Timing, compile_for, how_timed, measure_compiled
from mdn_jax import MDNState
from mdn_jax.ops import api
from mdn_jax.testing import LIMITS, Inputs, random_cotangents
from pallas_kernels.momentum_delta.block_scaling import (
    dequantize,
    scales_with_states,
    scales_with_v_new,
)
from pallas_kernels.momentum_delta.dv_local_bwd import dv_local_bwd
from pallas_kernels.momentum_delta.gate_bwd import gate_bwd
from pallas_kernels.momentum_delta.inter_chunk_bwd import inter_chunk_bwd
from pallas_kernels.momentum_delta.intra_chunk_bwd import intra_chunk_bwd
from pallas_kernels.momentum_delta.intra_chunk_fwd import intra_chunk_fwd
from pallas_kernels.momentum_delta.numerics import Numerics, can_be_precise
from pallas_kernels.momentum_delta.output_fwd import output_fwd
from pallas_kernels.momentum_delta.recompute_gamma import recompute_gamma
from pallas_kernels.momentum_delta.state_bwd import state_bwd
from pallas_kernels.momentum_delta.state_fwd import state_fwd
from pallas_kernels.momentum_delta.types import CHUNK, Memory, Options, Tokens, Values
from pallas_kernels.tiling import choose_tiles, padded_key_dim, padded_value_dim, unsupported

FORWARD = STAGES[:3]
CALLS = 4
"""Of a kernel in a program: handing many arrays over costs the host up to 0.12 ms a program."""


@dataclass(frozen=True)
class StagesConfig:
    """Times each kernel of the operator by itself; the sum is compared with no launch between."""

    shape: tuple[int, int, int, int, int] = (8, 4096, 6, 128, 256)
    """B T H K V, of sizes that need no padding."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of q, k, v."""
    explicit_p: bool = False
    """With an erase key of its own."""
    precise: bool = False
    """The kernels for bfloat16 under jax.default_matmul_precision("highest")."""
    stages: tuple[StageName, ...] = STAGES
    """Which kernels to time; all of them run."""
    runs: int = 20
    """Timed groups of calls after the warm-up; the median is shown."""
    interpret: bool = False
    """In the interpreter, on any device: says that the command works, not how long kernels take."""
    output: Path | None = None
    """Where to write the results as JSON."""


class Stage(NamedTuple):
    """One kernel with what it is called on.

    Attributes:
      name: one of `STAGES`.
      compiled: of the kernel alone, `calls` times.
      arguments: of the program.
      calls: in the program.
    """

    name: str
    compiled: Compiled
    arguments: tuple[Any, ...]
    calls: int


def stages(config: Annotated[StagesConfig, tyro.conf.arg(name="")]) -> None:
    """Times each kernel by itself; refuses to time kernels that are wrong together."""
    options, inputs = _options(config), _inputs(config)
    cotangent = random_cotangents(inputs)
    x = Tokens(**{name: inputs.get(name) for name in Tokens._fields})
    chain, results = run_stages(x, inputs["initial_state"], cotangent, options)
    errors = worst(results, jax.jit(scan_outputs_and_gradients)(inputs, cotangent))
    if not errors.within(LIMITS[config.dtype]):
        raise SystemExit(f"relative errors {errors} are above {LIMITS[config.dtype]}; not timed")
    costs = stage_costs(
        x.sizes,
        config.dtype,
        options.tiles,
        explicit_p=config.explicit_p,
        storage=options.numerics.storage,
    )
    timings: dict[str, Timing] = {
        stage.name: _measure(stage, config.runs) for stage in chain if stage.name in config.stages
    }
    device = jax.devices()[0].device_kind
    special = [", explicit p"] * config.explicit_p + [", precise"] * config.precise
    special += [", interpreted"] * config.interpret
    print(
        f"{device}, jax {jax.__version__}; B,T,H,K,V = {config.shape}, {config.dtype}",
        *special,
        sep="",
    )
    print(f"{how_timed(config.runs)}; relative errors of the chain: {errors}")
    print(table(costs, timings, device, config.dtype))
    if config.output:
        record = {
            "device": device,
            "jax": jax.__version__,
            "config": asdict(config),
            "tiles": options.tiles._asdict(),
            "errors": errors._asdict(),
            "results": {
                name: costs[name]._asdict()
                | {"floor": costs[name].floor(device, config.dtype)}
                | asdict(timings[name])
                for name in timings
            },
        }
        config.output.write_text(json.dumps(record, indent=1, default=str))


def _measure(stage: Stage, runs: int) -> Timing:
    """Of one call."""
    timing = measure_compiled(stage.compiled, *stage.arguments, runs=runs)
    return replace(
        timing,
        median=timing.median / stage.calls,
        spread=timing.spread / stage.calls,
        calls=timing.calls * stage.calls,
    )


def _options(config: StagesConfig) -> Options:
    """With the tiles that ship for the shape; exits where the kernels cannot run it."""
    batch, length, heads, key_dim, value_dim = config.shape
    padded = padded_key_dim(key_dim), padded_value_dim(value_dim)
    if length % CHUNK or padded != (key_dim, value_dim):
        raise SystemExit(
            f"shape: expected T a multiple of {CHUNK} and K, V that need no padding, such as "
            f"{padded}, got {config.shape}"
        )
    capability = (9, 0) if config.interpret else api._capability()
    if config.precise and not can_be_precise(config.dtype, capability or (9, 0)):
        raise SystemExit(
            f"precise: expected bfloat16 and compute capability 9.0, got {config.dtype} and "
            f"{capability}"
        )
    itemsize = jnp.dtype(config.dtype).itemsize
    reason = unsupported(
        key_dim, value_dim, capability, itemsize=itemsize, explicit_p=config.explicit_p
    )
    if capability is None or reason:
        raise SystemExit(f"the kernels expect {reason}; --interpret runs them anywhere, slowly")
    tiles = choose_tiles(
        key_dim,
        value_dim,
        itemsize,
        capability,
        explicit_p=config.explicit_p,
        precise=config.precise,
        heads=batch * heads,
    )
    numerics = Numerics(jnp.dtype(config.dtype), config.precise, config.interpret)
    return Options(key_dim**-0.5, True, tiles, numerics)


def _inputs(config: StagesConfig) -> Inputs:
    return inputs_of(config.shape, dtype=config.dtype, explicit_p=config.explicit_p)


def run_stages(
    x: Tokens, initial: MDNState, cotangent: tuple[Array, MDNState], options: Options
) -> tuple[list[Stage], Results]:
    """Runs the kernels one after another, each compiled by itself.

    Args:
      x: tokens and gates, as many key heads as value heads.
      initial: entering states.
      cotangent: of the outputs and the final states.
      options: of the call.

    Returns:
      The kernels with their arguments, and what they give together: outputs and gradients.
    """
    chain: list[Stage] = []
    calls = 1 if options.interpret else CALLS

    def run(kernel: Callable[..., Any], *arguments: Any, **fixed: Any) -> Any:
        program, inputs = several(
            lambda *arrays: kernel(*arrays, options, **fixed), arguments, calls
        )
        compiled = compile_for(program, *inputs)
        chain.append(Stage(kernel.__name__, compiled, inputs, calls))
        return compiled.call(*inputs)[0]

    d_o, d_final = cotangent
    intra = run(intra_chunk_fwd, x)
    v_new, states, final = run(state_fwd, x, intra, Memory(*initial))
    o = run(output_fwd, x, intra, v_new, states)

    # not in place: arguments stay as they are, to be timed again
    local = run(dv_local_bwd, x, intra, d_o)
    leaving = Memory(*d_final)
    d_v, d_states, d_initial = run(state_bwd, x, intra, d_o, local, leaving, in_place=False)
    values = (Values(d_o, local.d_o_scale), d_v, v_new)
    scales = scales_with_states(d_v, v_new, states, d_states)
    inter = run(inter_chunk_bwd, x, intra, values, states, d_states, scales)
    scales = scales_with_v_new(*values)
    gamma = run(recompute_gamma, x, intra.factors)
    keys = inter.keys
    scores = run(intra_chunk_bwd, x, intra, values, keys, scales, gamma, in_place=False)
    d_gates = run(gate_bwd, x, intra, inter.rows, scores)

    gradients = scores.keys._asdict() | d_gates._asdict() | {"v": dequantize(d_v, x.v.dtype)}
    gradients = {name: y for name, y in gradients.items() if y is not None}
    gradients["initial_state"] = MDNState(d_initial.s, d_initial.m)
    return chain, ((o, MDNState(final.s, final.m)), gradients)


def several(
    function: Callable[..., Any], arguments: tuple[Any, ...], calls: int
) -> tuple[Callable[..., list[Any]], tuple[Any, ...]]:
    """A program of several calls of which none can be left out, and its arguments.

    Args:
      function: called with `arguments`, pytrees of arrays.
      arguments: of each call.
      calls: how many.

    Returns:
      The program, which gives the results of all calls, and what to call it with. The smallest
      array in use is handed over once for each call: equal calls of the same arrays become one.
    """
    arrays, tree = jax.tree.flatten(arguments)
    traced = jax.make_jaxpr(function)(*arguments).jaxpr
    used = {x for equation in traced.eqns for x in equation.invars if isinstance(x, Var)}
    in_use = [i for i, x in enumerate(traced.invars) if x in used]
    smallest = min(in_use, key=lambda i: arrays[i].nbytes)

    def program(own: tuple[Array, ...], shared: tuple[Any, ...]) -> list[Any]:
        results = []
        for array in own:
            leaves = jax.tree.leaves(shared)
            leaves[smallest] = array
            results.append(function(*jax.tree.unflatten(tree, leaves)))
        return results

    return program, ((arrays[smallest],) * calls, arguments)


def table(costs: dict[str, Cost], timings: dict[str, Timing], device: str, dtype: str) -> str:
    """One row a kernel, then the sums of the forward pass and of both, of those that are timed."""
    rows = [_row(name, [name], costs, timings, device, dtype) for name in timings]
    for name, parts in (("forward", FORWARD), ("forward + backward", STAGES)):
        if timings.keys() >= set(parts):
            rows.append(_row(name, parts, costs, timings, device, dtype))
    headers = ["kernel", "GFLOP", "MB", "floor ms", "ms", "± ms", "x floor", "TFLOP/s", "GB/s"]
    return tabulate(rows, headers=[*headers, "calls", "compile s"], tablefmt="github")


def _row(
    name: str,
    parts: tuple[str, ...] | list[str],
    costs: dict[str, Cost],
    timings: dict[str, Timing],
    device: str,
    dtype: str,
) -> list[object]:
    flops, moved = (sum(costs[part][i] for part in parts) for i in range(2))
    floors = [costs[part].floor(device, dtype) or 0.0 for part in parts]
    seconds = sum(timings[part].median for part in parts)
    spread = sum(timings[part].spread for part in parts) / 2
    floor = sum(floors)
    return [
        name,
        f"{flops / 1e9:.3g}",
        f"{moved / 1e6:.4g}",
        f"{floor * 1e3:.3f}" if floor else "-",
        f"{seconds * 1e3:.3f}",
        f"{spread * 1e3:.3f}",
        f"{seconds / floor:.2f}" if floor else "-",
        f"{flops / seconds / 1e12:.3g}",
        f"{moved / seconds / 1e9:.4g}",
        timings[name].calls if name in timings else "",
        f"{sum(timings[part].compile for part in parts):.1f}",
    ]

"""The kernels along rows: norms and SwiGLU backward, cross entropy, beside XLA's code."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.costs import Cost
from benchmarks.timing import compile_for, how_timed, measure_compiled, milliseconds
from mdn_jax.ops.rowwise import Norm, normalized
from mdn_jax.testing import relative_errors
from pallas_kernels import rowwise as kernels

LIMITS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4}
"""Of the relative error of any result, against XLA's code in float32."""
_NORM = Norm(1e-5, "sigmoid", jnp.dtype("float32"))


@dataclass(frozen=True)
class RowwiseConfig:
    """Times the kernels at the shapes of a model; refuses to time one that is wrong."""

    tokens: int = 32_768
    """Of a micro-batch."""
    hidden: int = 1024
    """Width of the residual stream."""
    heads: int = 6
    """Value heads."""
    head: int = 256
    """Width of one."""
    mlp: int = 2816
    """Width of the MLP."""
    vocab: int = 50_257
    """Ids, filled up to a multiple of 64."""
    logits: int = 4096
    """Tokens whose logits are there at once."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of activations."""
    runs: int = 20
    """Timed groups of calls after the warm-up; the median is shown."""
    interpret: bool = False
    """In the interpreter, on any device: says that the command works, not how long kernels take."""


class _Case(NamedTuple):
    """A kernel's name, itself, XLA's code for the same results, and the arguments of both."""

    name: str
    kernel: Callable[..., Any]
    xla: Callable[..., Any]
    arguments: tuple[Array, ...]


def rowwise(config: Annotated[RowwiseConfig, tyro.conf.arg(name="")]) -> None:
    """Prints time, bandwidth and error of every kernel and of XLA's code."""
    if jax.default_backend() != "gpu" and not config.interpret:
        raise SystemExit("a CUDA GPU is needed; --interpret runs anywhere")
    device, lines = jax.devices()[0].device_kind, []
    print(f"{device}, jax {jax.__version__}, {config.dtype}; {how_timed(config.runs)}")
    for case in _cases(config):
        wide = [x.astype(jnp.float32) if _is_float(x) else x for x in case.arguments]
        expected = jax.jit(case.xla)(*wide)
        for name, run in (("kernel", case.kernel), ("xla", case.xla)):
            compiled = compile_for(run, *case.arguments)
            results = compiled.call(*case.arguments)
            error = max(relative_errors(results, expected).values())
            if not error <= LIMITS[config.dtype]:
                raise SystemExit(
                    f"{case.name}, {name}: expected errors up to {LIMITS[config.dtype]}, got "
                    f"{error}; not timed"
                )
            moved = sum(x.nbytes for x in jax.tree.leaves((case.arguments, results)))
            timing = measure_compiled(compiled, *case.arguments, runs=config.runs)
            floor = Cost(0, moved).floor(device, config.dtype)
            cells = (milliseconds(timing), f"{moved / timing.median / 1e9:.4g}")
            ratio = f"{timing.median / floor:.2f}" if floor else "-"
            lines.append([case.name, name, *cells, ratio, f"{error:.1e}"])
    headers = ["", "", "ms", "GB/s", "x floor", "error"]
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))


def _is_float(x: Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _cases(config: RowwiseConfig) -> Iterator[_Case]:
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape: int, dtype: Any = config.dtype) -> Array:
        return jax.random.normal(next(keys), shape, dtype)

    fixed = kernels.Norm(_NORM.eps, _NORM.activation, interpret=config.interpret)
    x, d_y, past = (normal(config.tokens, config.hidden) for _ in range(3))

    def residual(x: Array, scale: Array, d_y: Array, past: Array) -> Any:
        return kernels.rms_norm_bwd(fixed, x, scale, None, d_y, past)[:2]

    def residual_xla(x: Array, scale: Array, d_y: Array, past: Array) -> Any:
        norm = _NORM._replace(dtype=d_y.dtype)
        _, pull = jax.vjp(lambda x, scale: (normalized(norm, x, scale, None), x), x, scale)
        return pull((d_y, past))

    scale = normal(config.hidden, dtype="float32")
    yield _Case("rms_norm_bwd, residual", residual, residual_xla, (x, scale, d_y, past))

    shape = (config.tokens, config.heads, config.head)

    def gated(x: Array, scale: Array, gate: Array, d_y: Array) -> Any:
        return kernels.rms_norm_bwd(fixed._replace(again=True), x, scale, gate, d_y)

    def gated_xla(x: Array, scale: Array, gate: Array, d_y: Array) -> Any:
        norm = _NORM._replace(dtype=d_y.dtype)
        y, pull = jax.vjp(partial(normalized, norm), x, scale, gate)
        return *pull(d_y), y

    scale, arrays = normal(config.head, dtype="float32"), [normal(*shape) for _ in range(3)]
    yield _Case("rms_norm_bwd, gated", gated, gated_xla, (arrays[0], scale, *arrays[1:]))

    def swiglu_xla(both: Array, d_y: Array) -> Any:
        def product(both: Array) -> Array:
            gate, up = jnp.split(both, 2, axis=-1)
            return jax.nn.silu(gate) * up

        y, pull = jax.vjp(product, both)
        return *pull(d_y), y

    swiglu = partial(kernels.swiglu_bwd, interpret=config.interpret)
    both, d_y = normal(config.tokens, 2 * config.mlp), normal(config.tokens, config.mlp)
    yield _Case("swiglu_bwd", swiglu, swiglu_xla, (both, d_y))

    def loss_xla(logits: Array, targets: Array) -> Any:
        inside = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < config.vocab
        logits = jnp.where(inside, logits, -jnp.inf)
        total = jax.nn.logsumexp(logits, axis=1)
        at_target = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        hot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
        return total - at_target, (jnp.exp(logits - total[:, None]) - hot).astype(config.dtype)

    loss = partial(
        kernels.cross_entropy_fwd,
        vocab=config.vocab,
        ignored=-100,
        unknown=-1,
        dtype=config.dtype,
        interpret=config.interpret,
    )
    width = config.vocab + -config.vocab % 64
    targets = jax.random.randint(next(keys), (config.logits,), 0, config.vocab)
    yield _Case(
        "cross_entropy_fwd",
        loss,
        loss_xla,
        (normal(config.logits, width, dtype="float32"), targets),
    )

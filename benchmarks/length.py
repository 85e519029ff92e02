"""`python -m benchmarks length`: time a token against the length of a row, attention beside it."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import tyro
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.length_figure import draw
from benchmarks.reference import repeated_inputs_of
from benchmarks.timing import Compiled, Timing, compile_for, how_timed, measure_compiled
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops.api import Implementation
from mdn_jax.testing import LIMITS, Inputs, outputs_and_gradients, relative_error

Pass = Literal["forward", "both"]


@dataclass(frozen=True)
class LengthConfig:
    """Times the rule on as many tokens in rows of several lengths, causal attention beside it."""

    lengths: tuple[int, ...] = tuple(2**i for i in range(12, 20))
    """Tokens in a row."""
    tokens: int = 524_288
    """In a call, a multiple of every length: of shorter rows there are more."""
    rows: int | None = None
    """In a call at every length, in place of `tokens`; None: as many as `tokens` take."""
    heads: int = 6
    """Of the rule."""
    key_dim: int = 128
    """K of the rule."""
    value_dim: int = 256
    """V of the rule."""
    attention_heads: int = 8
    """Of attention: with its width, that of the residual stream of the 400M models."""
    attention_dim: int = 128
    """Width of a head of attention."""
    attention_to: int = 262_144
    """The longest rows that attention is timed at; 0: it is not."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of q, k, v."""
    implementation: Implementation | None = None
    """Of the rule; None: the best one."""
    runs: int = 5
    """Timed groups of calls after the warm-up; the median is shown."""
    threads: int = min(16, os.cpu_count() or 1)
    """Programs that compile at once."""
    output: Path | None = None
    """Where to write the results as JSON."""
    report: tuple[Path, ...] = ()
    """Such files to draw `figure` of; nothing is timed."""
    figure: Path = Path("length.png")
    """Where to draw it."""

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows: expected an int >= 1 or None, got {self.rows}")
        for length in self.lengths:
            if length < 1 or (self.rows is None and self.tokens % length):
                raise ValueError(
                    f"lengths: expected divisors of tokens = {self.tokens:,}, got {length}"
                )

    @property
    def most(self) -> int:
        """Tokens of the largest call."""
        return self.tokens if self.rows is None else self.rows * max(self.lengths)

    def rows_of(self, length: int) -> int:
        """Rows of this length in a call."""
        return self.rows or self.tokens // length


class Case(NamedTuple):
    """What is timed.

    Attributes:
      name: "rule" or "attention".
      part: which pass.
      length: tokens in a row.
    """

    name: str
    part: Pass
    length: int


def length(config: Annotated[LengthConfig, tyro.conf.arg(name="")]) -> None:
    """Times them; refuses to time a row whose beginning is not that of the shortest rows."""
    if config.report:
        draw(config.report, config.figure)
        print(config.figure)
        return
    inputs = {"rule": _rule_inputs(config), "attention": _attention_inputs(config)}
    cases = [
        Case(name, part, n)
        for name in inputs
        for n in sorted(config.lengths)
        for part in get_args(Pass)
        if name == "rule" or n <= config.attention_to
    ]

    def compiled(case: Case) -> Compiled:
        shapes = jax.eval_shape(partial(_rows, config, case.length), inputs[case.name])
        return compile_for(_run(config, case), *shapes)

    with ThreadPoolExecutor(config.threads) as pool:
        programs = list(pool.map(compiled, cases))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"{f'{config.rows} rows' if config.rows else f'{config.tokens:,} tokens'} a call, "
        f"{config.dtype}; rule: H,K,V = {config.heads},{config.key_dim},{config.value_dim}; "
        f"attention: {config.attention_heads} heads of {config.attention_dim}"
    )
    print(how_timed(config.runs), flush=True)
    timings, first = dict[Case, Timing](), dict[str, Array]()
    for case, program in zip(cases, programs, strict=True):
        arguments = _rows(config, case.length, inputs[case.name])
        try:
            if case.part == "forward":
                _check(config, case, program.call(*arguments), first)
            timings[case] = measure_compiled(program, *arguments, runs=config.runs)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{case.name}, {case.part}, rows of {case.length:,}: out of memory", flush=True)
    print(_table(config, timings))
    if config.output:
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "config": asdict(config),
            "results": [case._asdict() | asdict(timing) for case, timing in timings.items()],
        }
        config.output.write_text(json.dumps(record, indent=1, default=str))


def _rule_inputs(config: LengthConfig) -> tuple[Inputs, Array]:
    """Of one row of all tokens, and the gradient of its outputs."""
    shape = (1, config.most, config.heads, config.key_dim, config.value_dim)
    x = repeated_inputs_of(shape, dtype=config.dtype, initial_state=False)
    d_o: Any = x["v"]
    return x, d_o


def _attention_inputs(config: LengthConfig) -> tuple[Array, Array, Array, Array]:
    """Of one row of all tokens: queries, keys, values, and the gradient of the outputs."""
    shape = (1, config.most, config.attention_heads, config.attention_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_o = (jax.random.normal(key, shape, config.dtype) for key in keys)
    return q, k, v, d_o


def _rows[Tree](config: LengthConfig, length: int, x: Tree) -> Tree:
    """The tokens of one row as rows of this length."""
    rows = config.rows_of(length)

    def cut(y: Array) -> Array:
        return y[:, : rows * length].reshape(rows, length, *y.shape[2:])

    return jax.tree.map(cut, x)


def _run(config: LengthConfig, case: Case) -> Callable[..., Any]:
    return _run_rule(config, case) if case.name == "rule" else _run_attention(case)


def _run_rule(config: LengthConfig, case: Case) -> Callable[..., Any]:
    rule = partial(momentum_delta_rule, implementation=config.implementation)
    if case.part == "forward":
        return lambda x, d_o: rule(**x)[0]

    def both(x: Inputs, d_o: Array) -> Any:
        state = MDNState.zeros(d_o.shape[0], d_o.shape[2], config.key_dim, config.value_dim)
        return outputs_and_gradients(rule)(x, (d_o, state))

    return both


def _run_attention(case: Case) -> Callable[..., Any]:
    attention = partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
    )
    if case.part == "forward":
        return lambda q, k, v, d_o: attention(q, k, v)

    def both(q: Array, k: Array, v: Array, d_o: Array) -> Any:
        o, pull = jax.vjp(attention, q, k, v)
        return o, pull(d_o)

    return both


def _check(config: LengthConfig, case: Case, o: Array, first: dict[str, Array]) -> None:
    """The outputs of the first row begin as those of the shortest rows."""
    beginning = o[0, : min(config.lengths)]
    expected = first.setdefault(case.name, beginning)
    error = relative_error(beginning, expected)
    if not error <= LIMITS[config.dtype].outputs:
        raise SystemExit(
            f"{case.name}: the beginning of a row of {case.length:,} is {error:.1e} from that of "
            f"the shortest rows, above {LIMITS[config.dtype].outputs}; not timed"
        )


def _table(config: LengthConfig, timings: dict[Case, Timing]) -> str:
    """Nanoseconds a token, a row a length."""
    parts: tuple[Pass, ...] = get_args(Pass)
    columns = [(name, part) for name in ("rule", "attention") for part in parts]
    shortest = min(config.lengths)
    rows = []
    for n in sorted(config.lengths):
        cells = []
        for name, part in columns:
            timing, least = (timings.get(Case(name, part, i)) for i in (n, shortest))
            if timing is None or least is None:
                cells.append("-")
                continue
            each, first = (
                x.median / (config.rows_of(i) * i) * 1e9
                for x, i in ((timing, n), (least, shortest))
            )
            cells.append(f"{each:,.2f} ({each / first:.2f})")
        rows.append([f"{n:,}", *cells])
    headers = ["tokens in a row", *(f"{name}, {part}" for name, part in columns)]
    note = "nanoseconds a token (times those of the shortest rows)\n"
    return note + tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)

"""The operator's implementations side by side: correctness first, then time and memory."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array

from benchmarks import neighbours
from benchmarks.costs import Cost, operator_cost
from benchmarks.in_pieces import rule_in_pieces
from benchmarks.reference import (
    Results,
    float32_reference,
    forward,
    forward_keeping_states,
    inputs_of,
    worst,
)
from benchmarks.report import Part, Row, Shape, precision_note, record, shape_text, table
from benchmarks.timing import (
    Compiled,
    call_and_peak,
    compile_for,
    how_timed,
    measure_compiled,
)
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops.api import Implementation
from mdn_jax.testing import (
    LIMITS,
    Inputs,
    Limits,
    Rule,
    outputs_and_gradients,
    random_cotangents,
)
from pallas_kernels.momentum_delta.types import Sizes

PRESETS: dict[str, tuple[Shape, ...]] = {
    "h100": (
        (8, 4096, 6, 128, 256),
        (4, 4096, 6, 256, 512),
        (1, 32768, 6, 128, 256),
        (8, 4096, 16, 64, 64),
        (16, 2048, 8, 128, 128),
    )
}
"""B T H K V of the table in docs/kernels.md."""
PREFIX = 1041
"""Steps of a longer input that are checked: ragged, many chunks, seconds of the scan."""


@dataclass(frozen=True)
class KernelsConfig:
    """Times the operator's implementations on random inputs with the layer's gates."""

    shape: Shape = (2, 2048, 4, 64, 64)
    """B T H K V."""
    shapes: tuple[str, ...] = ()
    """Several, each as B,T,H,K,V, in place of `shape`."""
    preset: Literal["h100"] | None = None
    """The shapes of docs/kernels.md, in place of `shape`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    """Of q, k, v."""
    implementations: tuple[Implementation, ...] = ("scan", "xla")
    """What to time; times are compared with the first."""
    pieces: tuple[int, ...] = ()
    """Numbers of pieces that the GPU kernels cut a row in, a subject each; none: as they ship."""
    parts: tuple[Part, ...] = ("kept", "both")
    """Forward alone, forward with what the backward pass needs as a result, forward + backward."""
    runs: int = 20
    """Timed groups of calls after the warm-up (of one call on a CPU); the median is shown."""
    check_steps: int = 4096
    """Of longer inputs only the first 1,041 steps are checked."""
    threads: int = 1
    """Programs of a shape that compile at once."""
    neighbour: bool = True
    """Times the gated delta rule of jax-linear-attention as well, if that can be imported."""
    output: Path | None = None
    """Where to write the results as JSON."""


class Subject(NamedTuple):
    """An operator to be timed.

    Attributes:
      name: for the table.
      rule: takes the inputs.
      reference: the same in plain steps.
      inputs: of the rule.
      limits: of its errors.
      momentum: False for the gated delta rule.
    """

    name: str
    rule: Rule
    reference: Rule
    inputs: Inputs
    limits: Limits
    momentum: bool = True


class WrongResultsError(Exception):
    """An implementation that is not to be timed."""


class Refusal(NamedTuple):
    """Why an operator was not timed at a shape."""

    subject: Subject
    shape: Shape
    error: Exception

    def __str__(self) -> str:
        kind = "" if isinstance(self.error, WrongResultsError) else f"{type(self.error).__name__}: "
        return f"{self.subject.name} at {shape_text(self.shape)} is not timed: {kind}{self.error}"


def kernels(config: Annotated[KernelsConfig, tyro.conf.arg(name="")]) -> None:
    """Times the operator's implementations; refuses to time one that is wrong, and then fails."""
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, {config.dtype}{precision_note()}; "
        f"{how_timed(config.runs)}"
    )
    print(
        "TFLOP/s and GB/s: the operator's own operations and bytes whatever an implementation "
        "does, over the time; floor: the larger of both at the device's peaks"
    )
    records: list[dict[str, Any]] = []
    refused: list[Refusal] = []
    for shape in _shapes(config):
        rows, refusals = _run_shape(config, shape)
        steps = _steps(config, shape[1])
        extent = f"; checked over the first {steps} steps" if steps else ""
        print(f"\nB,T,H,K,V = {shape_text(shape)}{extent}")
        print(table(rows, device, config.dtype))
        print(*refusals, sep="\n", end="\n" if refusals else "", flush=True)
        refused += refusals
        records += [record(row, shape, device, config.dtype) for row in rows]
    other = neighbours.gated_delta_rule() if config.neighbour else "not asked for"
    if isinstance(other, str):
        print(f"\n{other}")
    if config.output:
        report = {
            "device": device,
            "jax": jax.__version__,
            "config": asdict(config),
            "timed": how_timed(config.runs),
            "not_timed": [str(refusal) for refusal in refused],
            "results": records,
        }
        config.output.write_text(json.dumps(report, indent=1, default=str))
    ours = [str(refusal) for refusal in refused if refusal.subject.momentum]
    if ours:
        raise SystemExit("\n".join(ours))


def _shapes(config: KernelsConfig) -> list[Shape]:
    if config.preset:
        return list(PRESETS[config.preset])
    return [_parse(text) for text in config.shapes] or [config.shape]


def _parse(text: str) -> Shape:
    try:
        batch, length, heads, key_dim, value_dim = (int(part) for part in text.split(","))
    except ValueError as error:
        raise SystemExit(f"shapes: expected B,T,H,K,V such as 8,4096,6,128,256: {text}") from error
    return batch, length, heads, key_dim, value_dim


def _run_shape(config: KernelsConfig, shape: Shape) -> tuple[list[Row], list[Refusal]]:
    """Rows of what was timed, and why the rest was not."""
    inputs = inputs_of(shape, dtype=config.dtype, initial_state=False)
    scan: Rule = partial(momentum_delta_rule, implementation="scan")
    limits = LIMITS[config.dtype]
    subjects = [
        Subject(name, rule, scan, inputs, limits)
        for implementation in config.implementations
        for name, rule in _rules(config, implementation)
    ]
    other = neighbours.gated_delta_rule() if config.neighbour else ""
    if isinstance(other, neighbours.Neighbour):
        arrays = neighbours.neighbour_inputs(inputs)
        subjects.append(
            Subject(*other, neighbours.reference_rule, arrays, neighbours.LIMITS, momentum=False)
        )
    cotangent = random_cotangents(inputs)
    steps = _steps(config, shape[1])
    checked = _first(cotangent, steps)
    d_o, d_state = checked
    short_cotangent = d_o[:, :steps], d_state
    rows: list[Row] = []
    refusals: list[Refusal] = []

    @cache
    def expected(reference: Rule, names: tuple[str, ...]) -> Results:
        short = {name: inputs[name][:, :steps] for name in names}
        return jax.jit(float32_reference(reference))(short, short_cotangent)

    with ThreadPoolExecutor(config.threads) as pool:
        compiled = [
            {part: pool.submit(_compile, subject, part, cotangent) for part in _parts(config)}
            for subject in subjects
        ]
        # what compiles beside a timed call delays its launches
        wait(future for programs in compiled for future in programs.values())
        for subject, programs in zip(subjects, compiled, strict=True):
            try:
                rows += _time(config, subject, programs, cotangent, checked, expected, steps)
            except Exception as error:  # of any kind: the other implementations still count
                refusals.append(Refusal(subject, shape, error))
    return rows, refusals


def _rules(config: KernelsConfig, implementation: Implementation) -> Iterator[tuple[str, Rule]]:
    """What to time of an implementation, with its name."""
    if implementation != "pallas_triton" or not config.pieces:
        yield implementation, partial(momentum_delta_rule, implementation=implementation)
        return
    for count in config.pieces:
        yield f"{implementation}, pieces {count}", rule_in_pieces(count)


def _parts(config: KernelsConfig) -> tuple[Part, ...]:
    """What is compiled: both passes, which are checked, and what is timed."""
    return tuple(dict.fromkeys(("both", *config.parts)))


def _compile(subject: Subject, part: Part, cotangent: tuple[Array, MDNState]) -> Compiled:
    """A pass of an operator."""
    if part == "both":
        return compile_for(outputs_and_gradients(subject.rule), subject.inputs, cotangent)
    function = forward_keeping_states if part == "kept" else forward
    return compile_for(function(subject.rule), subject.inputs)


def _steps(config: KernelsConfig, length: int) -> int | None:
    """How many of the first steps are checked; None: all."""
    return PREFIX if length > max(config.check_steps, PREFIX) else None


def _first(cotangent: tuple[Array, MDNState], steps: int | None) -> tuple[Array, MDNState]:
    """Cotangents of the first steps alone, so that later ones change no gradient of these."""
    if steps is None:
        return cotangent
    d_o, d_state = cotangent
    return d_o.at[:, steps:].set(0), jax.tree.map(jnp.zeros_like, d_state)


def _time(
    config: KernelsConfig,
    subject: Subject,
    programs: Mapping[Part, Future[Compiled]],
    cotangent: tuple[Array, MDNState],
    checked: tuple[Array, MDNState],
    expected: Callable[[Rule, tuple[str, ...]], Results],
    steps: int | None,
) -> list[Row]:
    """One row a pass; raises if it is wrong."""
    both = programs["both"].result()
    # before the reference, which may need more memory
    ((o, state), gradients), peak = call_and_peak(both, subject.inputs, checked)
    right = expected(subject.reference, tuple(subject.inputs))
    if steps is not None:
        o, state = o[:, :steps], right[0][1]
        gradients = {name: x[:, :steps] for name, x in gradients.items()}
    errors = worst(((o, state), gradients), right)
    del o, state, gradients
    if not errors.within(subject.limits):
        raise WrongResultsError(f"relative errors {errors} are above {subject.limits}")
    rows = []
    for part in config.parts:
        if part == "both":
            timing = measure_compiled(both, subject.inputs, cotangent, runs=config.runs)
            timing = replace(timing, peak=peak)
        else:
            timing = measure_compiled(programs[part].result(), subject.inputs, runs=config.runs)
        rows.append(Row(subject.name, part, _cost(config, subject, part), timing, errors))
    return rows


def _cost(config: KernelsConfig, subject: Subject, part: Part) -> Cost:
    batch, length, heads, key_dim = subject.inputs["k"].shape
    sizes = Sizes(batch, length, heads, heads, heads, key_dim, subject.inputs["v"].shape[3])
    backward = part == "both"
    return operator_cost(sizes, config.dtype, backward=backward, momentum=subject.momentum)

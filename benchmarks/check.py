"""The kernels with every tile choice that ships, on the present device, against the scan."""

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jaxtyping import Array

from benchmarks.cases import Case, shipped_cases
from benchmarks.in_pieces import rule_in_pieces
from benchmarks.reference import (
    Results,
    Worst,
    half_a_unit_off,
    scan_outputs,
    scan_outputs_and_gradients,
    widen,
    worst,
)
from benchmarks.report import precision_note
from benchmarks.timing import Compiled, compile_for
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops import api
from mdn_jax.ops.api import Implementation
from mdn_jax.testing import (
    LIMITS,
    Check,
    Inputs,
    Rule,
    conformance_checks,
    outputs_and_gradients,
    random_cotangents,
    relative_errors,
)
from pallas_kernels.backends import jax_triton_lacks


@dataclass(frozen=True)
class CheckConfig:
    """Outputs, final states and gradients of the kernels against the float32 scan.

    Random inputs and random cotangents of outputs and final states. Also that a second run gives
    the same bits. Beside the largest error of a gradient stands how far the scan's own moves when
    q, k, v, p and the cotangent of o move by at most half a unit in the last place: where a
    gradient nearly cancels, 16 bits of input do not say more.
    """

    only: str = ""
    """A regular expression; cases whose name has it are run."""
    limit_seconds: float | None = None
    """Starts no case after this time; fails if that leaves some out."""
    draws: int = 1
    """Of random inputs for each case; every one of them must be right."""
    rows: int | None = None
    """Of the batch, for every case, in place of its own: one, or many for tiles of many heads."""
    interpret: bool = False
    """In the interpreter, on any device, with the tiles of compute capability 9.0."""
    threads: int = min(12, os.cpu_count() or 1)
    """Cases that compile at once."""
    properties: bool = False
    """The conformance suite of `mdn_jax.testing` on the present device in place of the cases."""
    show: bool = False
    """Only names the cases."""
    output: Path | None = None
    """Where to write the results as JSON."""


class Ready(NamedTuple):
    """A case, compiled.

    Attributes:
      kernels: the kernels, outputs and gradients.
      scan: the reference, of inputs and cotangents in float32.
    """

    kernels: Compiled
    scan: Compiled


@dataclass(frozen=True)
class Outcome:
    """What became of a draw of a case.

    Attributes:
      case: the call.
      draw: number of its random inputs.
      worst: largest errors; None if it did not run to the end.
      moved: how far the gradient with the largest error moves in the reference with inputs and
        cotangents that differ by half a unit in the last place; 0 without gradients.
      identical: whether a second run gave the same bits.
      failure: why it did not run to the end; None if it did.
      compile: seconds to compile the kernels, others compiling beside them.
    """

    case: Case
    draw: int = 0
    worst: Worst | None = None
    moved: float = 0.0
    identical: bool = False
    failure: str | None = None
    compile: float = 0.0

    @property
    def name(self) -> str:
        """Of the case, and the draw unless it is the first."""
        return self.case.name + f"_draw{self.draw}" * (self.draw > 0)

    @property
    def passed(self) -> bool:
        """Whether it is right."""
        within = self.worst is not None and self.worst.within(LIMITS[self.case.dtype])
        return within and self.identical

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        if self.worst is None:
            return f"{mark} {self.name}: {self.failure}"
        limits = LIMITS[self.case.dtype]
        moved = f" (the scan's moves by {self.moved:.1e})" if self.moved else ""
        return (
            f"{mark} {self.name}: {self.worst}{moved}; limits {limits.outputs:.0e}, "
            f"{limits.gradients:.0e}; {'' if self.identical else 'NOT '}the same bits again; "
            f"compiled in {self.compile:.1f} s"
        )


def check(config: Annotated[CheckConfig, tyro.conf.arg(name="")]) -> None:
    """Runs the cases; fails if one is wrong or was not run."""
    start = time.perf_counter()
    capability = (9, 0) if config.interpret else api._capability()
    if capability is None:
        raise SystemExit("the kernels expect a CUDA GPU; --interpret runs them anywhere, slowly")
    if config.properties:
        _check_properties(config)
        return
    cases = [x for x in shipped_cases(capability) if re.search(config.only, x.name)]
    if config.rows is not None:
        cases = [replace(x, rows=config.rows) for x in cases]
    if config.draws < 1:
        raise SystemExit(f"draws: expected at least 1, got {config.draws}")
    if not cases:
        raise SystemExit(f"only: no case has {config.only!r} in its name")
    if config.show:
        print("\n".join(x.name for x in cases))
        return
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}{precision_note()}; "
        f"{len(cases)} cases against the float32 scan"
    )
    lacking = _why_no_triton(config)
    if lacking:
        print(f"without those in native Triton: {lacking}")
        cases = [x for x in cases if x.implementation != "triton"]
    deadline = start + config.limit_seconds if config.limit_seconds is not None else None
    outcomes = []
    for outcome in run_cases(
        cases,
        interpreted_rule if config.interpret else momentum_delta_rule,
        threads=config.threads,
        draws=config.draws,
        deadline=deadline,
    ):
        print(outcome, flush=True)
        outcomes.append(outcome)
    done = {x.case for x in outcomes}
    left = [x.name for x in cases if x not in done]
    failed = [x.name for x in outcomes if not x.passed]
    seconds = time.perf_counter() - start
    right = len({x.case for x in outcomes} - {x.case for x in outcomes if not x.passed})
    summary = f"{right} of {len(cases)} cases right in {seconds:.0f} s"
    if config.draws > 1:
        summary += "".join(f"\n{line}" for line in _spread(outcomes))
    print(
        summary
        + "".join(f"\nwrong: {x}" for x in failed)
        + "".join(f"\nnot run: {x}" for x in left)
    )
    if config.output:
        record = {
            "device": device,
            "jax": jax.__version__,
            "seconds": seconds,
            "not_run": left,
            "results": [_record(x) for x in outcomes],
        }
        config.output.write_text(json.dumps(record, indent=1))
    if failed or left:
        raise SystemExit(f"{len(cases) - right - len(left)} cases wrong, {len(left)} not run")


def suite(rule: Rule, *, native: bool) -> dict[str, Check]:
    """The checks of the conformance suite for the kernels, by name.

    Args:
      rule: the operator; also gets the implementation.
      native: with those of the decode kernel in native Triton.
    """
    dtypes = ("float32", "bfloat16", "float16")
    kernels = partial(rule, implementation="pallas_triton")
    checks = {f"chunks-{x}": x for x in conformance_checks(kernels, dtypes=dtypes)}
    for name, implementation in (("decode", "pallas_triton"), ("triton", "triton"))[: 1 + native]:
        steps = conformance_checks(
            partial(rule, implementation=implementation),
            dtypes=dtypes,
            chunk=1,
            lengths=(1, 2, 8, 16),
            gradients=False,
        )
        checks |= {f"{name}-{x}": x for x in steps}
    return checks


def _check_properties(config: CheckConfig) -> None:
    """Runs the conformance suite, a line a check; fails if one fails."""
    lacking = _why_no_triton(config)
    rule = interpreted_rule if config.interpret else momentum_delta_rule
    every = suite(rule, native=not lacking)
    checks = {name: x for name, x in every.items() if re.search(config.only, name)}
    if not checks:
        raise SystemExit(f"only: no check has {config.only!r} in its name")
    if config.show:
        print("\n".join(checks))
        return
    if lacking:
        print(f"without those in native Triton: {lacking}")
    wrong = 0
    for name, check in checks.items():
        problems = check.problems()
        wrong += bool(problems)
        print("FAIL" if problems else "ok  ", "\n     ".join((name, *problems)), flush=True)
    print(f"{len(checks) - wrong} of {len(checks)} checks right")
    if wrong:
        raise SystemExit(f"{wrong} checks wrong")


def run_cases(
    cases: Sequence[Case],
    rule: Rule,
    *,
    threads: int,
    draws: int = 1,
    deadline: float | None = None,
) -> Iterator[Outcome]:
    """Compiles cases in threads and runs one after another, in order.

    Args:
      cases: what to run.
      rule: the operator; also gets the implementation.
      threads: that compile at once.
      draws: of random inputs for each case.
      deadline: of `time.perf_counter`; a case that would begin later is left out.
    """

    def ready(case: Case) -> Ready | None:
        if deadline is not None and time.perf_counter() > deadline:
            return None
        if case.precise:  # of this thread alone
            with jax.default_matmul_precision("highest"):
                return build(case)
        return build(case)

    def build(case: Case) -> Ready:
        arguments = _arguments(case, 0)
        chosen: Rule = partial(rule, implementation=case.implementation)
        if case.pieces is not None:
            chosen = rule_in_pieces(case.pieces, interpret=rule is interpreted_rule)
        on_kernels = outputs_and_gradients(chosen, gradients=case.backward)
        scan = scan_outputs_and_gradients if case.backward else scan_outputs
        kernels = compile_for(on_kernels, *arguments)
        return Ready(kernels, compile_for(scan, *widen(arguments)))

    with ThreadPoolExecutor(threads) as pool:
        for case, future in [(case, pool.submit(ready, case)) for case in cases]:
            try:
                compiled = future.result()
                if compiled is not None:
                    yield from (_run(case, draw, compiled) for draw in range(draws))
            except Exception as error:  # of any kind: the other cases still count
                lines = str(error).strip().splitlines() or [""]
                yield Outcome(case, failure=f"{type(error).__name__}: {lines[0][:300]}")


def _arguments(case: Case, draw: int) -> tuple[Inputs, tuple[Array, MDNState]]:
    """Inputs of the operator, and cotangents of its outputs and final states."""
    inputs = case.inputs(seed=draw)
    return inputs, random_cotangents(inputs, seed=99 + draw)


def _run(case: Case, draw: int, ready: Ready) -> Outcome:
    arguments = _arguments(case, draw)
    first, again = (ready.kernels.call(*arguments) for _ in range(2))
    right = ready.scan.call(*widen(arguments))
    errors = worst(first, right, on_host=True)
    moved = 0.0
    if errors.gradient_name:
        beside = ready.scan.call(*half_a_unit_off(arguments))
        moved = relative_errors(beside[1], right[1])[errors.gradient_name]
    return Outcome(
        case,
        draw,
        worst=errors,
        moved=moved,
        identical=_same_bits(first, again),
        compile=ready.kernels.seconds,
    )


def _spread(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """How many draws have a gradient outside the limits, and the largest errors, by dtype."""
    for dtype, limits in LIMITS.items():
        errors = sorted(
            (x.worst.gradient for x in outcomes if x.worst and x.case.dtype == dtype), reverse=True
        )
        outside = sum(error > limits.gradients for error in errors)
        if errors:
            largest = " ".join(f"{error:.1e}" for error in errors[:8])
            yield f"{dtype}: {outside} of {len(errors)} draws have a gradient outside; {largest}"


def _same_bits(first: Results, again: Results) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def _why_no_triton(config: CheckConfig) -> str | None:
    if config.interpret:
        return "it has no interpreter here"
    missing = jax_triton_lacks()
    return f"it needs {missing}" if missing else None


def interpreted_rule(*, implementation: Implementation, **arrays: Any) -> tuple[Array, MDNState]:
    """`momentum_delta_rule` on the kernels in the interpreter, with the tiles that ship."""
    assert implementation == "pallas_triton"
    return rule_in_pieces(None, interpret=True)(**arrays)


def _record(outcome: Outcome) -> dict[str, object]:
    return {
        "name": outcome.name,
        "draw": outcome.draw,
        "passed": outcome.passed,
        "limits": LIMITS[outcome.case.dtype]._asdict(),
        "worst": outcome.worst._asdict() if outcome.worst else None,
        "moved": outcome.moved,
        "identical": outcome.identical,
        "failure": outcome.failure,
        "compile": outcome.compile,
        "case": asdict(outcome.case),
    }

"""Checks against the definition. Each yields a sentence for everything that is wrong."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mdn_jax.testing.cases import Case
from mdn_jax.testing.inputs import GATE_REGIMES, random_cotangents
from mdn_jax.testing.subject import GATES, KEYS, Inputs, Problems, Subject


def every_regime(subject: Subject, dtype: str) -> Problems:
    """Each gate regime with each kind of keys, one head a row."""
    regimes = regimes_for(dtype)
    # float16 ends at 65,504, and a zero key's gradient is divided by 1e-3
    keys = KEYS if dtype != "float16" else ("random", "parallel")
    case = subject.case(
        dtype,
        explicit_p=False,
        regime=regimes,
        keys=keys,
        rows=math.lcm(len(regimes), len(keys)),
        heads=1,
        groups=1,
        documents=1,
    )
    yield from subject.against_definition(case)


def packed_and_grouped(subject: Subject, dtype: str) -> Problems:
    """Several documents a row, two value heads a key head, an erase key of its own."""
    regimes = regimes_for(dtype)
    for i in range(0, len(regimes), 4):
        yield from subject.against_definition(subject.case(dtype, regime=regimes[i : i + 4]))


def any_length(subject: Subject, dtype: str) -> Problems:
    """One step, a chunk, one step more and less."""
    for length in subject.lengths:
        case = subject.plain_case(dtype, length)
        inputs = case.inputs()
        if case.documents == 1:  # as in `pieces`, which then compiles nothing
            inputs["segment_ids"] = jnp.zeros((case.rows, length), jnp.int32)
        yield from (f"T = {length}: {x}" for x in subject.against_definition(case, inputs))


def keys_as_they_are(subject: Subject, dtype: str) -> Problems:
    """Without normalisation, with a scale, and an erase key for every value head."""
    case = subject.case(dtype)
    inputs = case.inputs()
    inputs["p"] = jnp.concatenate([inputs["p"], -0.5 * inputs["p"]], axis=2).astype(dtype)
    for name in ("q", "k"):
        inputs[name] = (inputs[name] * case.key_dim**-0.5).astype(dtype)
    yield from subject.against_definition(case, inputs, scale=0.7, normalize_qk=False)


def no_state_and_odd_dims(subject: Subject, dtype: str) -> Problems:
    """Without entering state and documents, with sizes that no tile fits."""
    key_dim, value_dim = subject.odd_dims
    case = Case(key_dim, value_dim, dtype, length=subject.longest, initial_state=False, rows=2)
    yield from subject.against_definition(case)


def gates_of_zero(subject: Subject, dtype: str) -> Problems:
    """Log gates of minus infinity: everything is forgotten, and nothing is nan."""
    case = subject.case(dtype, regime="layer")
    inputs = case.inputs()
    inputs["segment_ids"] = jnp.zeros_like(inputs["segment_ids"])
    step = np.arange(case.length)[:, None] % 9 == 0
    for name, rows in (("log_alpha", (0, 2, 3)), ("log_mu", (1, 2, 3))):
        gate = np.array(inputs[name])
        for row in rows:
            gate[row] = np.where(step | (row == 3), -np.inf, gate[row])
        inputs[name] = jnp.asarray(gate)
    yield from subject.against_definition(case, inputs)


def short_keys(subject: Subject, dtype: str) -> Problems:
    """Keys of length 1e-3 and 0: the gradient of the norm is up to a thousand times larger."""
    case = subject.case(dtype, regime="layer")
    none = 0 if dtype != "float16" else 1e-3  # whose gradient leaves the range of float16
    factors = {"q": (1e-3, 1, 1, none), "k": (1, 1e-3, 1, none), "p": (1, 1, 1e-3, none)}
    inputs = case.inputs()
    for name, by_row in factors.items():
        inputs[name] = inputs[name] * jnp.asarray(by_row, dtype)[:, None, None, None]
    yield from subject.against_definition(case, inputs)


def huge_keys(subject: Subject, dtype: str) -> Problems:
    """Long keys have a direction all the same; of keys whose squares overflow, at least no other.

    Where float32 cannot hold their squares an implementation may give nan, but nothing finite that
    is wrong.
    """
    case = subject.case(dtype, regime="layer")

    def scaled(size: float) -> Inputs:
        inputs = case.inputs()
        return inputs | {name: (inputs[name] * size).astype(dtype) for name in ("q", "k")}

    # float16 holds no gradient that is divided by these lengths
    only = ("o", "s", "m") if dtype == "float16" else ()
    long = scaled({"float64": 1e120, "float16": 6e3}.get(dtype, 1e15))
    yield from subject.against_definition(case, long, only=only)
    if dtype != "float16":
        longer = scaled(1e180 if dtype == "float64" else 1e20)
        o = np.asarray(subject.run(longer, random_cotangents(longer))["o"], np.float64)
        if np.isfinite(o).all():
            yield from subject.against_definition(case, longer, only=("o", "s", "m"))
        elif not np.isnan(o[:, 1:]).all():
            yield "o: of keys of 1e20, expected what is right, or nan from there on"


def small_cotangents(subject: Subject, dtype: str) -> Problems:
    """Gradients of gates and states keep their digits where a loss is divided by a million."""
    case = subject.case(dtype)
    inputs = case.inputs()
    small = jax.tree.map(lambda x: (x * 2.0**-20).astype(x.dtype), random_cotangents(inputs))
    names = tuple(f"d_{name}" for name in (*GATES, "initial_state.s", "initial_state.m"))
    yield from subject.against_definition(case, inputs, small, only=names)


def under_x64(subject: Subject, dtype: str) -> Problems:
    """The same with `jax_enable_x64` on, where indices are 64-bit integers."""
    with jax.enable_x64(True):
        yield from subject.against_definition(subject.plain_case(dtype, subject.lengths[-2]))


def regimes_for(dtype: str) -> tuple[str, ...]:
    """Gate regimes: float16 ends at 6e-8 and holds no gradient through a momentum of e^-30."""
    return tuple(x for x in GATE_REGIMES if dtype != "float16" or x != "momentum_lost")

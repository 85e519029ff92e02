"""Checks of two ways to the same numbers: in pieces, in another order, again."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdn_jax.ops.state import MDNState
from mdn_jax.testing.inputs import random_cotangents
from mdn_jax.testing.subject import (
    GATES,
    Inputs,
    Problems,
    Results,
    Subject,
    other_bits,
    zeros_like_state,
)


def pieces(subject: Subject, dtype: str) -> Problems:
    """Two calls, the second with the state of the first, are one call: gradients as well."""
    for whole, head in _cuts(subject.lengths):
        case = subject.plain_case(dtype, whole)
        inputs = case.inputs()
        # a document that started right at the cut would be continued by the state
        ids = np.array(inputs["segment_ids"])
        ids[:, head:] -= ids[:, head : head + 1] - ids[:, head - 1 : head]
        inputs["segment_ids"] = jnp.asarray(ids)
        d_o, d_state = jax.tree.map(np.asarray, random_cotangents(inputs))
        expected = subject.run(inputs, (d_o, d_state))
        first = steps(inputs, 0, head) | {"initial_state": inputs["initial_state"]}
        carried = subject.run(first, (d_o[:, :head], zeros_like_state(d_state)))
        second = steps(inputs, head, whole) | {"initial_state": _state(carried, "")}
        end = subject.run(second, (d_o[:, head:], d_state))
        if subject.gradients:
            d_carried = _state(end, "d_initial_state.")
            carried = subject.run(first, (d_o[:, :head], d_carried))
        problems = subject.alike(_joined(carried, end), expected, case)
        yield from (f"{whole} = {head} + {whole - head} steps: {x}" for x in problems)


def documents_alone(subject: Subject, dtype: str) -> Problems:
    """Packed documents are what each is alone."""
    whole, head = next(_cuts(subject.lengths))
    case = subject.plain_case(dtype, whole)
    inputs = case.inputs()
    late = np.arange(whole)[None].repeat(case.rows, 0) >= head
    inputs["segment_ids"] = jnp.asarray(late, jnp.int32)
    d_o, d_state = jax.tree.map(np.asarray, random_cotangents(inputs))
    expected = subject.run(inputs, (d_o, d_state))
    first = steps(inputs, 0, head) | {"initial_state": inputs["initial_state"]}
    second = steps(inputs, head, whole) | {
        "initial_state": zeros_like_state(inputs["initial_state"])
    }
    alone = (
        subject.run(first, (d_o[:, :head], zeros_like_state(d_state))),
        subject.run(second, (d_o[:, head:], d_state)),
    )
    yield from subject.alike(_joined(*alone), expected, case)


def other_orders(subject: Subject, dtype: str) -> Problems:
    """Rows and heads in another order give the same in that order."""
    case = subject.case(dtype)
    inputs = case.inputs()
    cotangents = random_cotangents(inputs)
    expected = subject.run(inputs, cotangents)
    rows, key_heads, value_heads = np.asarray([2, 0, 3, 1]), [1, 0], [3, 2, 0, 1]

    def heads_of(name: str) -> tuple[int, list[int]]:
        if name.startswith(("s", "m", "d_initial", "initial")):
            return 1, value_heads
        return 2, key_heads if name.removeprefix("d_") in ("q", "k", "p") else value_heads

    def moved(name: str, x: Any) -> Any:
        x = np.asarray(x)[rows]
        axis, heads = heads_of(name)
        return x if name == "segment_ids" else np.take(x, np.asarray(heads), axis=axis)

    other = {
        name: jax.tree.map(lambda y, name=name: jnp.asarray(moved(name, y)), x)
        for name, x in inputs.items()
    }
    d_o, d_state = cotangents
    d_other = jnp.asarray(moved("o", d_o)), MDNState(*(jnp.asarray(moved("s", x)) for x in d_state))
    actual = subject.run(other, d_other)
    case = replace(case, regime="other")
    yield from subject.alike(actual, {name: moved(name, x) for name, x in expected.items()}, case)


def same_bits(subject: Subject, dtype: str) -> Problems:
    """Again, over memory that holds nan, gives the same bits: all that is read was written."""
    case = subject.case(dtype)
    inputs = case.inputs()
    cotangents = random_cotangents(inputs)
    first = subject.run(inputs, cotangents)
    for _ in range(2):
        poison_memory()
        again = subject.run(inputs, cotangents)
        yield from other_bits(first, again)


def idle_steps(subject: Subject, dtype: str) -> Problems:
    """Gates of no effect leave the states as they are, bit for bit (rows that have ended)."""
    case = subject.case(dtype)
    inputs = case.inputs()
    inputs |= {name: jnp.zeros_like(inputs[name]) for name in GATES}
    inputs["segment_ids"] = jnp.zeros_like(inputs["segment_ids"])
    results = subject.run(inputs, random_cotangents(inputs))
    s, m = inputs["initial_state"]
    yield from other_bits({"s": np.asarray(s), "m": np.asarray(m)}, results)


def steps(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The call restricted to steps `[start, stop)`, without its entering state."""
    per_step = {name: x for name, x in inputs.items() if name != "initial_state"}
    return {name: np.asarray(x)[:, start:stop] for name, x in per_step.items()}


def poison_memory(mebibytes: int = 64) -> None:
    """Fills memory of the device with nan and gives it back, so that whoever is next gets it."""
    sizes = [mebibytes * 2**18, *(2**k for k in range(8, 18))]
    for x in [jnp.full(size, np.nan, jnp.float32) for size in sizes]:
        jax.block_until_ready(x)
        x.delete()


def _cuts(lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Lengths that are the sum of two others, longest first: the whole and its first piece."""
    for whole in reversed(lengths):
        heads = [x for x in lengths if x < whole and whole - x in lengths]
        if heads:
            yield whole, max(heads, key=lambda x: min(x, whole - x))


def _state(results: Results, prefix: str) -> MDNState:
    return MDNState(*(jnp.asarray(results[prefix + name]) for name in ("s", "m")))


def _joined(first: Results, second: Results) -> Results:
    """Results of two calls on the pieces of a sequence as those of one."""
    joined = {}
    for name in first:
        if name in ("s", "m"):
            joined[name] = second[name]
        elif name.startswith("d_initial_state"):
            joined[name] = first[name]
        else:
            joined[name] = np.concatenate([first[name], second[name]], axis=1)
    return joined

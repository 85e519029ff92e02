"""Checks of what must not be seen: other documents, later steps, what is not finite elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np

from mdn_jax.testing.cases import Case
from mdn_jax.testing.inputs import random_cotangents
from mdn_jax.testing.subject import (
    GATES,
    Cotangents,
    Inputs,
    Problems,
    Results,
    Subject,
    differences,
    other_bits,
    zeros_like_state,
)


def no_leak(subject: Subject, dtype: str) -> Problems:
    """A document is the same whatever stands in the others, and gives them no gradient.

    Other keys, values and entering states change none of its bits. Other gates may change how sums
    of log gates are rounded, and other sizes how 16-bit intermediates are.
    """
    case = subject.case(dtype)
    inputs, late = _two_documents(subject, case)
    cotangents = random_cotangents(inputs)
    expected = subject.run(inputs, cotangents)
    for side, own in (("an earlier", late), ("a later", ~late)):
        other = _changed(inputs, ("q", "k", "v", "p"), own, -3)
        names = ["o"]
        if side == "an earlier":
            names += ["s", "m"]
            state = jax.tree.map(np.asarray, inputs["initial_state"])
            other["initial_state"] = jax.tree.map(lambda x: 100 * x, state)
        kept = {name: _where(expected[name], name, own) for name in names}
        same = dict.fromkeys(names, subject.limits[dtype].same)
        for what, call in (
            ("document is seen", other),
            ("document's gates are seen", _changed(other, GATES, own, 0.5)),
        ):
            actual = subject.run(call, cotangents)
            seen = {name: _where(actual[name], name, own) for name in names}
            exact = call is other and dtype in ("float32", "float64")
            problems = other_bits(kept, seen) if exact else differences(seen, kept, same, case)
            yield from (f"{side} {what}: {x}" for x in problems)
        if subject.gradients:
            yield from _gradient_leaks(subject, inputs, cotangents, own, side)


def _gradient_leaks(
    subject: Subject, inputs: Inputs, cotangents: Cotangents, own: np.ndarray, side: str
) -> Problems:
    """Only steps of `own` are asked about: no other step may get a gradient."""
    d_o, d_state = cotangents
    if side == "a later":
        d_state = zeros_like_state(d_state)
    asked = np.where(own[:, :, None, None], d_o, np.zeros((), d_o.dtype))
    results = subject.run(inputs, (asked, d_state))
    for name, gradient in results.items():
        if name.startswith("d_initial_state"):
            if side == "an earlier" and gradient.any():
                yield f"{name}: expected 0 from the second document, got {_largest(gradient)}"
        elif name.startswith("d_"):
            if gradient[~own].any():
                got = _largest(gradient[~own])
                yield f"{name}: expected 0 at {side} document's steps, got {got}"
            if not gradient[own].any():
                yield f"{name}: expected a gradient at the document's own steps, got 0"
    if side == "an earlier":
        first = own & ~np.pad(own, ((0, 0), (1, 0)))[:, :-1]
        for name in ("d_log_alpha", "d_log_mu"):
            if results[name][first].any():
                got = _largest(results[name][first])
                yield f"{name}: expected 0 at a document's first step, got {got}"


def bad_values(subject: Subject, dtype: str) -> Problems:
    """Nan and inf stay in their document, row and head; they may spoil their own chunk."""
    case = subject.case(dtype)
    inputs = case.inputs()
    at = min(3, case.length // 4)
    start = min(at + subject.chunk + 3, case.length - 1)
    ids = np.arange(case.length)[None].repeat(case.rows, 0) >= start
    inputs["segment_ids"] = jnp.asarray(ids.astype(np.int32))
    cotangents = random_cotangents(inputs)
    clean = subject.run(inputs, cotangents)
    bad = inputs | {name: np.array(inputs[name]) for name in ("k", "v")}
    for name, row, value in (("v", 0, np.nan), ("v", 1, np.inf), ("k", 2, np.nan)):
        # of the first head: value heads 0 and 1 share key head 0
        bad[name][row, at, 0, 0] = value
    actual = subject.run(bad, cotangents)

    def untouched(results: Results) -> Results:
        """The second document, the other heads and the last row, which has no bad value."""
        kept = {}
        for name, x in results.items():
            if name.startswith("d_initial_state"):
                continue
            by_step = name not in ("s", "m")
            kept[f"{name} of the second document"] = x[:, start:] if by_step else x
            kept[f"{name} of another head"] = x[:, :, -1] if by_step else x[:, -1]
            kept[f"{name} of another row"] = x[3:]
        return kept

    same = dict.fromkeys(untouched(clean), subject.limits[dtype].same)
    yield from differences(untouched(actual), untouched(clean), same, case)


def bad_cotangents(subject: Subject, dtype: str) -> Problems:
    """A cotangent that is nan stays in its document, row and head."""
    if not subject.gradients:
        return
    case = subject.case(dtype)
    inputs = case.inputs()
    start = max(1, case.length - 2 - subject.chunk // 2)
    ids = np.arange(case.length)[None].repeat(case.rows, 0) >= start
    inputs["segment_ids"] = jnp.asarray(ids.astype(np.int32))
    d_o, d_state = random_cotangents(inputs)
    clean = subject.run(inputs, (d_o, d_state))
    bad = np.array(d_o)
    bad[0, -1, 0, 0] = np.nan
    actual = subject.run(inputs, (bad, d_state))

    def untouched(results: Results) -> Results:
        kept = {}
        for name, x in results.items():
            if name.startswith("d_initial_state"):
                kept[f"{name} of the first document"] = x
            elif name.startswith("d_"):
                kept[f"{name} of the first document"] = x[:, :start]
                kept[f"{name} of another head"] = x[:, :, -1]
                kept[f"{name} of another row"] = x[1:]
        return kept

    same = dict.fromkeys(untouched(clean), subject.limits[dtype].same)
    yield from differences(untouched(actual), untouched(clean), same, case)


def causal(subject: Subject, dtype: str) -> Problems:
    """Later steps change no bit of earlier outputs, and get no gradient from them."""
    case = subject.case(dtype)
    inputs = case.inputs()
    at = case.length // 2 - 1
    cotangents = random_cotangents(inputs)
    expected = subject.run(inputs, cotangents)
    early = np.arange(case.length)[None].repeat(case.rows, 0) < at
    other = _changed(_changed(inputs, GATES, early, 0.5), ("q", "k", "v", "p"), early, -3)
    # nan in another chunk, too
    beyond = at + subject.chunk
    if beyond < case.length:
        other["v"][:, beyond:] = np.nan
    actual = subject.run(other, cotangents)
    yield from other_bits({"o": expected["o"][:, :at]}, {"o": actual["o"][:, :at]})
    if not subject.gradients:
        return
    d_o = np.zeros_like(cotangents[0])
    d_o[:, at] = 1
    for name, gradient in subject.run(inputs, (d_o, zeros_like_state(cotangents[1]))).items():
        if name.startswith("d_") and not name.startswith("d_initial_state"):
            if gradient[:, at + 1 :].any():
                yield f"{name}: expected 0 after step {at}, got {_largest(gradient[:, at + 1 :])}"
            if not gradient[:, : at + 1].any():
                yield f"{name}: expected a gradient up to step {at}, got 0"


def _two_documents(subject: Subject, case: Case) -> tuple[Inputs, np.ndarray]:
    """Inputs with two documents a row, cut within a chunk and at its end, and where the second is.

    Returns:
      The inputs, and a mask `[B, T]` of the second document's steps.
    """
    c = subject.chunk
    cuts = np.clip([c + 6, c, c // 2 + 8, 1], 1, case.length - 1)
    late = np.arange(case.length)[None] >= cuts[:, None]
    return case.inputs() | {"segment_ids": jnp.asarray(late.astype(np.int32))}, late


def _largest(x: np.ndarray) -> str:
    return f"{np.abs(x.astype(np.float64)).max():.1e}"


def _changed(inputs: Inputs, names: tuple[str, ...], own: np.ndarray, factor: float) -> Inputs:
    """Arrays times a factor at every step but a document's own."""
    other = dict(inputs)
    for name in names:
        x = np.asarray(inputs[name])
        own_steps = own.reshape(*own.shape, *(1,) * (x.ndim - 2))
        other[name] = np.where(own_steps, x, (factor * x).astype(x.dtype))
    return other


def _where(x: np.ndarray, name: str, own: np.ndarray) -> np.ndarray:
    """A result with zeros at all steps but a document's own; final states as they are."""
    return x if name in ("s", "m") else np.where(own[:, :, None, None], x, np.zeros_like(x))

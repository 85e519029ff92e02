"""Kernels a token, counted from traces made up here."""

from collections import Counter

import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks.generation import Row, table
from benchmarks.launches import Launches, TokenLaunches, difference, launches_of, trace_of

NAMES = {1: "gemv", 2: "fusion", 3: "MemcpyD2H", 4: "Memset"}
DETAILS = {1: "kernel_details", 2: "memcpy_details", 3: "correlation_id"}


def event(name, *details):
    stats = " ".join(f'stats {{ metadata_id: {i} str_value: "x" }}' for i in details)
    return f"events {{ metadata_id: {name} duration_ps: 5 {stats} }}"


def plane(name, **lines):
    """A plane of XLA's profiler; lines by their names, in which _ is a blank."""
    parts = [
        f'lines {{ id: {i} name: "{line.replace("_", " ")}" {" ".join(events)} }}'
        for i, (line, events) in enumerate(lines.items())
    ]
    for kind, texts in (("event", NAMES), ("stat", DETAILS)):
        parts += [
            f'{kind}_metadata {{ key: {i} value {{ id: {i} name: "{text}" }} }}'
            for i, text in texts.items()
        ]
    return f'planes {{ name: "{name}" {" ".join(parts)} }}'


def traced(*planes):
    return ProfileData.from_serialized_xspace(
        ProfileData.text_proto_to_serialized_xspace(" ".join(planes))
    )


def test_kernels_and_copies_are_counted_on_the_streams_of_gpus():
    stream = {"Stream #14(Compute)": [event(1, 3, 1)] * 2 + [event(2, 1), event(3, 2), event(4)]}
    other = {"Stream #15(MemcpyD2H)": [event(3, 2)], "XLA_Ops": [event(1, 1)] * 7}
    found = launches_of(
        traced(
            plane("/device:GPU:0", **stream, **other),
            plane("/host:CPU", **{"Stream #1": [event(1, 1)]}),
            plane("/device:GPU:1", **{"Stream #3": [event(1, 1)]}),
        )
    )
    assert found == Launches({"gemv": 3, "fusion": 1}, 2)


def test_a_trace_without_kernels_says_what_it_has():
    trace = traced(plane("/host:CPU", python=[event(1, 1)]))
    with pytest.raises(
        ValueError, match=r"trace: expected kernels .*, got the lines /host:CPU pyt"
    ):
        launches_of(trace)


def test_a_trace_of_this_device_is_read():
    with pytest.raises(ValueError, match="trace: expected kernels on a stream of a GPU, got"):
        launches_of(trace_of(lambda: jnp.ones(3) + 1))


def test_a_token_has_nothing_of_what_a_block_does_once():
    few = Launches(Counter(a=9, once=3), 5)
    many = Launches(Counter(a=17, once=3, b=2), 9)
    found = difference(few, many, 4)
    assert found == TokenLaunches({"a": 2, "b": 0.5}, 1)
    assert found.total == 2.5
    rows = [
        Row("kernels", 1, 10, None, 1e-3, 1, 1, found),
        Row("layers", 1, 10, None, 1e-3, 1, 1, None),
    ]
    lines = table(rows).splitlines()
    assert [cell.strip() for cell in lines[-2].split("|")[-3:-1]] == ["2.5", "1"]
    assert [cell.strip() for cell in lines[-1].split("|")[-3:-1]] == ["-", "-"]

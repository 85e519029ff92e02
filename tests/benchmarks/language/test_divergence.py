"""What metrics say about a run that left the path."""

from benchmarks.language.divergence import describe, explain


def measured(step, *layers):
    record = {"step": step}
    for i, layer in enumerate(layers):
        values = {"unstable_heads": 0.0, "growing_heads": 0.0, "memory_norm": 1.0 + i}
        values |= {"memory_growth": 1.5, "momentum_growth": 1.2, "fastest_head": 0, **layer}
        record |= {f"layers.{i}.{name}": x for name, x in values.items()}
    return record


GROWING = {"growing_heads": 0.25, "momentum_growth": 9.0, "fastest_head": 3, "memory_norm": 50.0}


def test_a_calm_run():
    assert explain([{"step": 1, "loss": 2.0, "skipped": 0}]) is None
    found = explain([measured(10, {}, {}), measured(20, {}, {"memory_norm": 7.0})])
    assert (found["skipped_from"], found["unstable"], found["growing"]) == (None, None, None)
    assert found["last"]["layer"] == 1
    assert found["curve"] == [[10, 2.0, 1.5], [20, 7.0, 1.5]]
    assert describe(found) == describe(None) == ""


def test_a_state_that_grows_before_steps_are_skipped():
    records = [
        measured(10, {}, {}),
        measured(20, {"unstable_heads": 0.5}, GROWING),
        {"step": 25, "loss": None, "skipped": 3},
        measured(30, {"memory_growth": None, "growing_heads": 1.0, "memory_norm": None}, {}),
    ]
    found = explain(records)
    assert found["skipped_from"] == 25
    assert found["unstable"] == {"step": 20, "layer": 0, "share": 0.5}
    assert found["growing"] == {
        "step": 20,
        "layer": 1,
        "head": 3,
        "quantity": "momentum",
        "growth": 9.0,
    }
    assert found["last"] == found["growing"] | {"norm": 50.0}
    assert found["curve"][-1] == [30, None, None]
    assert describe(found) == (
        "steps skipped from 25 on; gates outside the stable region at step 20 in layer 0; the "
        "momentum of layer 1, head 3 grows 9 times in half a row at step 20"
    )


def test_steps_are_skipped_and_no_state_grew():
    found = explain([measured(10, {}), {"step": 12, "skipped": 1}])
    assert "no state grew before; the largest memory, of layer 0: 1" in describe(found)
    assert describe(explain([{"step": 12, "skipped": 1}])) == "steps skipped from 12 on"


def test_what_is_not_finite_is_said():
    lost = {"memory_growth": None, "growing_heads": 1.0, "memory_norm": None, "fastest_head": 2}
    found = explain([measured(10, {}, lost)])
    assert "the memory of layer 1, head 2 not finite at step 10" in describe(found)

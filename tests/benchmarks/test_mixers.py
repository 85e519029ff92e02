"""`python -m benchmarks mixers`: sees what is wrong, on the paths that run anywhere."""

from functools import partial

import pytest

from benchmarks import mixers as command
from benchmarks.mixers import LIMIT, MixersConfig, calls, mixers

SMALL = MixersConfig(length=32, heads=1, key_dim=16)


def elsewhere(call):
    """The call with "xla" in place of the path that needs a GPU."""
    keywords = call.fast.keywords
    if "fused" in keywords:
        return call._replace(fast=partial(call.fast, fused=False))
    return call._replace(fast=partial(call.fast.func, implementation="xla"))


@pytest.mark.parametrize(
    "name", ["GDN, mosaic_gpu, packed", "Mamba-3, xla, packed", "attention, cuDNN, window 64"]
)
def test_a_right_path_and_a_wrong_one(name):
    (call,) = [elsewhere(call) for call in calls(SMALL) if call.name == name]
    assert 0 < command._largest_error(call) <= LIMIT / 2

    def wrong(**arrays):
        return call.fast(**arrays | {"q": 1.05 * arrays["q"], "v": 1.05 * arrays["v"]})

    assert command._largest_error(call._replace(fast=wrong)) > LIMIT


def test_failures_are_named(monkeypatch, capsys):
    def breaks(**_):
        raise RuntimeError("no such kernel")

    first, second, *_ = calls(SMALL)
    broken = first._replace(fast=breaks)
    monkeypatch.setattr(command, "calls", lambda config: [broken, elsewhere(second)])
    monkeypatch.setattr(command.jax, "default_backend", lambda: "gpu")
    with pytest.raises(SystemExit, match=f"^wrong: {first.name}$"):
        mixers(SMALL)
    shown = capsys.readouterr().out
    assert f"{first.name}: RuntimeError: no such kernel" in shown
    assert f"{second.name}: " in shown


def test_every_fast_path_is_there():
    names = [call.name for call in calls(SMALL)]
    assert len(set(names)) == len(names) == 21
    with pytest.raises(SystemExit, match="expect a CUDA GPU"):
        mixers(SMALL)

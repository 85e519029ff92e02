"""`python -m benchmarks convolution` in the interpreter: what it says, and what it refuses."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import convolution as command
from benchmarks.command import main

TINY = "convolution --interpret --shapes 1,9,3 --taps 2 --document 4 --runs 2 --dtype float32"


@pytest.mark.slow
def test_every_pass_is_timed(tmp_path, capsys):
    output = tmp_path / "convolution.json"
    main([*TINY.split(), "--output", str(output)])
    out = capsys.readouterr().out
    assert "| 1,9,3        | forward | xla " in out
    results = json.loads(output.read_text())["results"]
    assert [(x["passes"], x["name"].split()[0]) for x in results] == [
        (passes, name) for name in ("xla", "kernels", "joined") for passes in ("both", "forward")
    ]
    assert [x["cost"][1] for x in results[:2]] == [5 * 9 * 3 * 4, 2 * 9 * 3 * 4]
    assert all(x["timing"]["median"] > 0 and x["error"] < 1e-5 for x in results)


def test_wrong_kernels_are_not_timed(monkeypatch):
    def wrong(branches, starts, **options):
        return tuple(y + 0.01 for y in command.xla_convolutions(branches, starts))

    monkeypatch.setattr(command, "short_convolution", wrong)
    with pytest.raises(SystemExit, match=r"kernels .*: expected errors up to 0\.0001, got"):
        main(TINY.split())


def test_what_it_refuses():
    with pytest.raises(
        SystemExit, match=r"shapes: expected positive integers B,T,width,.*, got '1,2'"
    ):
        main(["convolution", "--shapes", "1,2"])
    with pytest.raises(SystemExit, match="tiles: expected positive integers strips,steps,"):
        main(["convolution", "--tiles", "4,64,128"])
    with pytest.raises(SystemExit, match="a CUDA GPU is needed"):
        main(["convolution"])


def test_documents_and_cotangents():
    config = command.ConvolutionConfig(document=4)
    branches, starts, d_y = command.arguments(config, (1, 9, 3, 5))
    assert jnp.flatnonzero(starts[0]).tolist() == [4, 8]
    assert [x.shape for x in d_y] == [x.x.shape for x in branches] == [(1, 9, 3), (1, 9, 5)]
    assert all(x.dtype == jnp.bfloat16 for x in d_y)

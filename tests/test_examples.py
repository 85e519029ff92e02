"""The examples run, and show what they say."""

import pytest

from examples import check_your_kernel, documents_and_pieces, own_training_loop
from mdn_jax.testing import random_inputs, relative_error


def test_a_right_kernel_and_a_wrong_one(monkeypatch, capsys):
    monkeypatch.setattr(check_your_kernel, "GATE_REGIMES", ("layer",))
    check_your_kernel.main()
    assert capsys.readouterr().out.startswith("layer ")
    right = check_your_kernel.mine

    def wrong(**inputs):
        return right(**inputs | {"log_mu": inputs["log_mu"] / 2})

    monkeypatch.setattr(check_your_kernel, "mine", wrong)
    with pytest.raises(SystemExit, match=r"outside 0\.0001: layer"):
        check_your_kernel.main()


@pytest.mark.slow
def test_the_own_loop_learns():
    first, last = own_training_loop.train(steps=60)
    assert first > 2.5
    assert last < 1.5


def test_documents_and_pieces():
    inputs = random_inputs(seed=0, batch=1, length=200, regime="layer", initial_state=False)
    packed, separate = documents_and_pieces.packed_and_separate(inputs)
    assert relative_error(packed, separate) < 1e-6
    assert relative_error(documents_and_pieces.in_pieces(inputs, 100), separate) > 1e-3

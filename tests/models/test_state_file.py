"""Generation states in files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNForCausalLM, generate
from mdn_jax.models import load_state, prefill, save_state, stream
from mdn_jax.models.generate import _decode
from tests.layers.helpers import TINY, TINY_ATTENTION, assert_close

CONFIG = dataclasses.replace(TINY, attn=dataclasses.replace(TINY_ATTENTION, window_size=None))


def make(config=CONFIG, seed=0, **options):
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(seed), **options)


MODEL = make()
PROMPTS = [[1, 2, 3, 4], [5]]
STATE = prefill(MODEL, PROMPTS)


@pytest.fixture
def file(tmp_path):
    save_state(tmp_path / "state.npz", STATE, MODEL)
    return tmp_path / "state.npz"


def test_a_loaded_state_goes_on_as_if_nothing_had_happened(file):
    loaded = load_state(file, MODEL)
    options = {"max_new_tokens": 6, "block": 8, "seed": 3}
    after = [generate(MODEL, [[], [9]], state=state, **options) for state in (STATE, loaded)]
    assert after[0].tokens == after[1].tokens
    assert_close(after[0].state, after[1].state, 0)
    # what comes after generation is kept too, without the entries that are still empty
    save_state(file, after[0].state, MODEL)
    again = load_state(file, MODEL)
    assert again.cache[1].k.shape[1] == 10
    assert_close(again.cache[0], after[0].state.cache[0], 0)
    assert list(file.parent.iterdir()) == [file]


def test_a_loaded_state_compiles_the_loop_once(tmp_path):
    # parameters on a device by name, as those of a checkpoint are
    graph, weights = nnx.split(make(dataclasses.replace(TINY, num_hidden_layers=1), seed=1))
    model = nnx.merge(graph, jax.device_put(weights, jax.devices()[0]))
    save_state(tmp_path / "s", prefill(model, [[1, 2, 3]]), model)
    loaded = load_state(tmp_path / "s", model)
    before = _decode._cache_size()
    for _ in stream(model, loaded, max_new_tokens=9, block=3):
        pass
    assert _decode._cache_size() == before + 1


def test_bfloat16(tmp_path):
    config = dataclasses.replace(TINY, num_hidden_layers=1)
    model = make(config, dtype=jnp.bfloat16)
    state = prefill(model, [[1, 2, 3]])
    save_state(tmp_path / "s", state, model)
    loaded = load_state(tmp_path / "s", model)
    assert loaded.cache[0].q_tail.dtype == jnp.bfloat16
    assert_close(loaded, state, 0)
    with pytest.raises(ValueError, match=r"state: expected cache.0.q_tail float32.* got bfloat16"):
        load_state(tmp_path / "s", make(config))


def test_states_of_other_models_are_refused(file):
    other = make(dataclasses.replace(CONFIG, tau_factor=2.0))
    with pytest.raises(ValueError, match="state: expected one of this model's configuration"):
        load_state(file, other)
    with pytest.raises(ValueError, match="expected one made with this model's parameters"):
        load_state(file, make(seed=1))
    # keys that change nothing do not count
    extras = (("eos_token_id", "2"),)
    load_state(file, make(dataclasses.replace(CONFIG, extras=extras)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-200],
        lambda data: data[: len(data) // 2],
        lambda data: data[:2000] + bytes([data[2000] ^ 255]) + data[2001:],
        lambda data: b"",
        lambda data: b"something else",
    ],
)
def test_damaged_files_are_refused(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"state: expected a file of save_state, got .*state.npz"):
        load_state(file, MODEL)


def test_other_npz_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", header=np.array("{}"), x=np.zeros(3))
    with pytest.raises(ValueError, match="state: expected a file of save_state"):
        load_state(tmp_path / "a.npz", MODEL)
    np.savez(tmp_path / "b.npz", header=np.array(["x"], object))
    with pytest.raises(ValueError, match="state: expected a file of save_state"):
        load_state(tmp_path / "b.npz", MODEL)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none.npz", MODEL)


def test_a_failed_write_leaves_the_file_before(file, monkeypatch):
    before = file.read_bytes()

    def fail(*args, **kwargs):
        args[0].write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space left"):
        save_state(file, STATE, MODEL)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]

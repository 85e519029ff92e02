"""Generation states in files."""

import dataclasses
import io
import json
import os
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNForCausalLM, generate
from mdn_jax.models import load_state, prefill, save_state, stream
from mdn_jax.models.blocks import decode_block
from tests.layers.helpers import BARE, TINY_ATTENTION, assert_close

CONFIG = dataclasses.replace(BARE, attn=dataclasses.replace(TINY_ATTENTION, window_size=None))


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
    graph, weights = nnx.split(make(dataclasses.replace(BARE, num_hidden_layers=1), seed=1))
    model = nnx.merge(graph, jax.device_put(weights, jax.devices()[0]))
    save_state(tmp_path / "s", prefill(model, [[1, 2, 3]]), model)
    loaded = load_state(tmp_path / "s", model)
    before = decode_block(in_place=False, graphs=False)._cache_size()
    for _ in stream(model, loaded, max_new_tokens=9, block=3):
        pass
    assert decode_block(in_place=False, graphs=False)._cache_size() == before + 1


def test_bfloat16(tmp_path):
    config = dataclasses.replace(BARE, num_hidden_layers=1)
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


def rewritten(file, changes, *, compression=zipfile.ZIP_STORED):
    """The file with members replaced, added, or (None) left out."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in contents.items():
            if data is not None:
                archive.writestr(name, data)


def npy(x):
    written = io.BytesIO()
    np.save(written, x)
    return written.getvalue()


def lying(shape, dtype="<f4", data=b"\0" * 64):
    """An array of a few bytes whose header says that it is another."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def changed_header(file, **changes):
    header = json.loads(str(np.load(file)["header"]))
    return npy(np.array(json.dumps(header | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"logits.npy": lying("(1073741824, 31)")},
        {"position.npy": lying("(4294967296,)", "<i4")},
        {"cache.1.k.npy": lying("(2, 3, 2, 99999999999)")},
        {"header.npy": lying("()", "<U1000000000")},
        {"logits.npy": lying("(-1, -16)")},
        {"logits.npy": lying("(" * 4000 + ")" * 4000)},
        {"logits.npy": lying("(1,)", "|O")},
        {"logits.npy": b"\x93NUMPY\x03\x00" + b"\xff" * 100},
        {"header.npy": npy(np.array("[" * 100_000))},
        {"header.npy": npy(np.array("x" * 2**23))},
        {"header.npy": npy(np.array('{"format": "mdn-jax generation state 1", "config": 3}'))},
        {"header.npy": None},
        {"note.txt": b"hello"},
    ],
)
def test_files_that_lie_are_refused_before_they_are_read(file, changes):
    rewritten(file, changes)
    tracemalloc.start()
    with pytest.raises(ValueError, match="state: expected a file of save_state") as raised:
        load_state(file, MODEL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24 + 4 * file.stat().st_size
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_file_that_unpacks_to_more_is_refused(file):
    rewritten(file, {"logits.npy": npy(np.zeros((2**22, 31), bool))}, compression=8)
    assert file.stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(ValueError, match="expected arrays as they are, got a member"):
        load_state(file, MODEL)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_names_shapes_and_types_are_those_of_the_model(file):
    good = file.read_bytes()
    for changes, words in (
        ({"seen.npy": None}, "expected an array 'seen' .*got none"),
        ({"more.npy": npy(np.zeros(3))}, "expected no array 'more' .*got one"),
        (
            {"position.npy": npy(np.zeros((2, 1), np.int32))},
            r"expected position \[B\], got \[2, 1\]",
        ),
        (
            {"logits.npy": npy(np.zeros((2, 7), np.float32))},
            r"float32\[2, 31\], got float32\[2, 7\]",
        ),
        ({"logits.npy": npy(np.zeros((2, 31), np.float16))}, r"logits float32.*, got float16"),
        ({"header.npy": changed_header(file, config="0" * 64)}, r"of another \(000000000000\)"),
    ):
        file.write_bytes(good)
        rewritten(file, changes)
        with pytest.raises(ValueError, match=f"state: .*{words}"):
            load_state(file, MODEL)


def test_a_flipped_bit_is_seen_or_changes_nothing(file):
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(good), 24).tolist():
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        try:
            assert_close(load_state(file, MODEL), STATE, 0)
        except ValueError as error:
            assert str(error).startswith("state: ")  # noqa: PT017
            refused += 1
    assert refused >= 18


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(ValueError, match=r"state: expected a file of save_state.*no regular"):
            load_state(path, MODEL)


def test_writers_of_one_path_do_not_meet(tmp_path):
    other = prefill(MODEL, PROMPTS, state=STATE)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(
            lambda i: save_state(tmp_path / "s", (STATE, other)[i % 2], MODEL), range(12)
        ):
            pass
    loaded = load_state(tmp_path / "s", MODEL)
    assert np.asarray(loaded.position).tolist() in ([4, 1], [8, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]

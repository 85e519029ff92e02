"""Published folders on the disk: exact both ways, and every way in which one can be wrong."""

import dataclasses
import functools
import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.interop import (
    folder_parameters,
    model_from_folder,
    new_directory,
    official_state_dict,
    read_folder,
    write_folder,
)
from mdn_jax.models import AttentionConfig
from tests.layers.helpers import TINY, TINY_ATTENTION, assert_close, call

HYBRID = dataclasses.replace(
    TINY,
    conv_bias=True,
    use_lora_gate=True,
    attn=dataclasses.replace(TINY_ATTENTION, qkv_bias=True),
    extras=(("bos_token_id", "1"), ("fuse_norm", "true"), ("torch_dtype", '"float32"')),
)
TIED = dataclasses.replace(TINY, tie_word_embeddings=True)
CONFIGS = {"mdn": TINY, "hybrid": HYBRID, "tied": TIED}


@functools.cache
def drawn(config, seed):
    return official_state_dict(MDNForCausalLM(config, rngs=nnx.Rngs(seed)))


def published(config, dtype=np.float32, seed=0):
    """Tensors by published name, as a published folder has them, to be changed."""
    tensors = {name: x.astype(dtype) for name, x in drawn(config, seed).items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def make_folder(path, config, tensors, shards=1):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def tensors_of(path):
    return {k: x for file in path.glob("*.safetensors") for k, x in load_file(file).items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        np.testing.assert_array_equal(actual[name].view(np.uint8), x.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back_is_exact(tmp_path, name, dtype, shards):
    tensors = published(CONFIGS[name], dtype)
    # bits that no arithmetic would keep
    tensors["model.norm.weight"][:2] = [-0.0, np.nan]
    folder = read_folder(make_folder(tmp_path / "in", CONFIGS[name], tensors, shards))
    (tmp_path / "out").mkdir()
    limit = 4 << 30 if shards == 1 else sum(x.nbytes for x in tensors.values()) // 3
    write_folder(tmp_path / "out", folder.config, folder_parameters(folder), shard_bytes=limit)
    assert_same(tensors_of(tmp_path / "out"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert MDNConfig.from_dict(config) == dataclasses.replace(
        CONFIGS[name], extras=MDNConfig.from_dict(config).extras
    )
    assert (
        config.items() >= (CONFIGS[name].to_dict() | {"torch_dtype": np.dtype(dtype).name}).items()
    )
    assert config["model_type"] == "momentum_deltanet"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    if shards == 1:
        assert names == {"config.json", "model.safetensors"}
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == tensors.keys()
        assert set(index["weight_map"].values()) < names
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    again = read_folder(tmp_path / "out")
    for (path, x), (other, y) in zip(
        folder_parameters(folder), folder_parameters(again), strict=True
    ):
        assert path == other
        assert x.tobytes() == y.tobytes()


def test_mixed_dtypes_stay(tmp_path):
    tensors = published(TINY, ml_dtypes.bfloat16)
    tensors["model.layers.0.attn.A_log"] = tensors["model.layers.0.attn.A_log"].astype(np.float32)
    folder = read_folder(make_folder(tmp_path / "in", TINY, tensors))
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", folder.config, folder_parameters(folder))
    assert_same(tensors_of(tmp_path / "out"), tensors)


def test_a_model_from_a_folder(tmp_path):
    model = MDNForCausalLM(HYBRID, rngs=nnx.Rngs(3))
    path = make_folder(tmp_path / "in", HYBRID, published(HYBRID, seed=3), 2)
    tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
    assert_close(call(model_from_folder(path), tokens), call(model, tokens), 0)


def test_tied_embeddings_may_be_there_twice(tmp_path):
    tensors = published(TIED)
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"]
    folder = read_folder(make_folder(tmp_path / "in", TIED, tensors))
    assert "lm_head" not in {path[0] for path, _ in folder_parameters(folder)}
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight: expected the tensor of"):
        next(folder_parameters(read_folder(tmp_path / "in")))


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    tensors = published(TINY)
    del tensors["model.layers.1.attn.A_log"]
    tensors["model.layers.2.attn.A_log"] = np.zeros(2, np.float32)
    tensors["lm_head.weight"] = np.zeros((3, 4), np.float32)
    folder = read_folder(make_folder(tmp_path / "in", TINY, tensors))
    with pytest.raises(ValueError, match="tensors: ") as raised:
        next(folder_parameters(folder))
    for problem in (
        "missing model.layers.1.attn.A_log [2]",
        "unexpected model.layers.2.attn.A_log [2]",
        "lm_head.weight: expected shape [31, 32], got [3, 4]",
    ):
        assert problem in str(raised.value)


def _truncate(path):
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _spoil_header(path):
    file = path / "model-00001-of-00002.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


def _integers(path):
    file = path / "model-00001-of-00002.safetensors"
    save_file(load_file(file) | {"model.norm.weight": np.zeros(32, np.int32)}, file)


def _edit_header(change):
    def edit(path):
        file = path / "model-00001-of-00002.safetensors"
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header[min(header.keys() - {"__metadata__"})])
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return edit


def _pipe(path):
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")


def _edit_index(change):
    def edit(path):
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, ["model-00002-of-00002.safetensors", "complete", "damaged"]),
        (_spoil_header, ["model-00001-of-00002.safetensors", "damaged"]),
        (_integers, ["model.norm.weight", "F32, BF16 or F16", "I32"]),
        (
            lambda path: (path / "model-00001-of-00002.safetensors").unlink(),
            ["index.json", "'model-00001-of-00002.safetensors'", "not there"],
        ),
        (
            lambda path: (path / "model.safetensors.index.json").write_text("{"),
            ["index.json", "expected JSON"],
        ),
        (
            lambda path: (path / "model.safetensors.index.json").write_text("{}"),
            ["index.json", "'weight_map'"],
        ),
        (
            _edit_index(lambda m: m.update({"lm_head.weight": "../model.safetensors"})),
            ["files beside it", "../model.safetensors"],
        ),
        (
            _edit_index(lambda m: m.update(other=m["lm_head.weight"])),
            ["other of the index is not in"],
        ),
        (
            _edit_index(lambda m: m.pop("lm_head.weight")),
            ["lm_head.weight in", "is not there in the index"],
        ),
        *(
            (_edit_header(lambda tensor, lie=lie: tensor.update(lie)), ["00001", "damaged"])
            for lie in (
                {"shape": [1 << 40, 1 << 30]},
                {"shape": [3]},
                {"data_offsets": [0, 1 << 60]},
                {"dtype": "F64"},
            )
        ),
        (
            lambda path: (path / "model-00002-of-00002.safetensors").write_bytes(b""),
            ["00002", "damaged"],
        ),
        (
            lambda path: (path / "model.safetensors.index.json").write_text("[" * 10**5),
            ["index.json", "expected JSON"],
        ),
        (
            lambda path: (path / "config.json").write_text('{"a":' * 10**5),
            ["config.json", "expected JSON"],
        ),
        (lambda path: (path / "config.json").write_text("{}"), ["config.json", "empty object"]),
        (_pipe, ["config.json", "readable"]),
        (lambda path: (path / "config.json").unlink(), ["config.json", "readable"]),
        (lambda path: (path / "config.json").write_text("[]"), ["config.json", "object", "list"]),
        (lambda path: (path / "config.json").write_text("{'a'"), ["config.json", "JSON"]),
        (
            lambda path: (path / "config.json").write_text('{"hiden_size": 3}'),
            ["config.json", "hiden_size: unknown key", "hidden_size"],
        ),
    ],
)
def test_a_damaged_folder_is_one_clear_error(tmp_path, damage, words):
    path = make_folder(tmp_path / "in", TINY, published(TINY), 2)
    damage(path)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        list(folder_parameters(read_folder(path)))
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_no_files_and_the_same_tensor_twice(tmp_path):
    path = make_folder(tmp_path / "in", TINY, published(TINY))
    save_file({"lm_head.weight": np.zeros(3, np.float32)}, path / "more.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is in model.safetensors and more"):
        read_folder(path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"expected model.safetensors or .* found neither"):
        read_folder(path)


def test_parameters_that_are_not_the_models_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"parameters: unexpected nothing\.known"):
        write_folder(tmp_path / "out", TINY, [(("nothing", "known"), np.zeros(3))])
    with pytest.raises(ValueError, match=r"tensors: .*missing lm_head.weight \[31, 32\]"):
        write_folder(tmp_path / "out", TINY, [(("norm", "scale"), np.ones(32))])


def test_a_new_directory_is_complete_or_absent(tmp_path):
    with new_directory(tmp_path / "a" / "b") as directory:
        (directory / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"

    def interrupted():
        with new_directory(tmp_path / "c") as directory:
            (directory / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    message = "output: expected a path where nothing is yet"
    with pytest.raises(ValueError, match=message), new_directory(tmp_path / "a"):
        pass
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty"):
        pass
    with pytest.raises(ValueError, match=message), new_directory(tmp_path / "a" / "b" / "file"):
        pass


def test_attention_without_shared_heads(tmp_path):
    config = dataclasses.replace(TINY, attn=AttentionConfig(layers=(0, 1), num_heads=4))
    tensors = published(config)
    folder = read_folder(make_folder(tmp_path / "in", config, tensors))
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", config, folder_parameters(folder))
    assert_same(tensors_of(tmp_path / "out"), tensors)


def test_one_entry_for_all_value_heads_of_one_key_head(tmp_path):
    """As the published layer keeps it; what differs by value head is written as it is."""
    config = dataclasses.replace(TINY, num_heads=1, num_v_heads=2)
    names = ("A_log", "Mu_log", "log_factor")
    many = published(config)
    one = {k: x[:1] if k.endswith(names) else x for k, x in many.items()}
    assert sum(x.shape == (1,) for x in one.values()) == 3 * config.num_hidden_layers
    for i, tensors in enumerate((one, many)):
        folder = make_folder(tmp_path / f"in{i}", config, tensors)
        model = model_from_folder(folder)
        gates = model.layers[0].mixer.gates
        for ours, name in (("a_log", "A_log"), ("mu_log", "Mu_log"), ("log_factor", "log_factor")):
            expected = np.broadcast_to(tensors[f"model.layers.0.attn.{name}"], (2,))
            np.testing.assert_array_equal(getattr(gates, ours)[...], expected)
        assert_same(official_state_dict(model), tensors)
        (tmp_path / f"out{i}").mkdir()
        read = read_folder(folder)
        write_folder(tmp_path / f"out{i}", read.config, folder_parameters(read))
        assert_same(tensors_of(tmp_path / f"out{i}"), tensors)
    two = dataclasses.replace(TINY, num_heads=2, num_v_heads=4)
    tensors = {k: x[:1] if k.endswith("A_log") else x for k, x in published(two).items()}
    with pytest.raises(ValueError, match=r"A_log: expected shape \[4\], got \[1\]"):
        model_from_folder(make_folder(tmp_path / "two", two, tensors))

"""mdn-convert as a user meets it: exact there and back, and nothing half-written."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.cli import convert, generate
from mdn_jax.cli.convert import main
from mdn_jax.models import AttentionConfig
from mdn_jax.saved.model import find_checkpoint, load_model, read_params
from tests.interop.test_folder import assert_same, make_folder, published, tensors_of
from tests.tiny import TINY_MODEL
from tests.train.helpers import tiny_config
from train.loop import train
from train.step import split_model

CONFIG = MDNConfig(
    **TINY_MODEL | {"num_hidden_layers": 2, "tie_word_embeddings": True},
    attn=AttentionConfig(layers=(1,), num_heads=2),
    extras=(("bos_token_id", "1"), ("torch_dtype", '"bfloat16"')),
)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run, and its result; it is only read."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("trained") / "run", sample_tokens=0)
    return config, train(config)


def save_tokenizer(folder):
    """A tokenizer of three words, the last of which ends a text."""
    library = Tokenizer(WordLevel({"a": 0, "b": 1, "<|endoftext|>": 2}, unk_token="a"))
    library.save(str(folder / "tokenizer.json"))
    return (folder / "tokenizer.json").read_text()


def convert_there_and_back(source, between, target, *flags):
    assert main(["import", str(source), str(between)]) == 0
    assert main(["export", str(between), str(target), *flags]) == 0


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_there_and_back_is_exact(tmp_path, capsys, dtype):
    tensors = published(CONFIG, dtype)
    source = make_folder(tmp_path / "in", CONFIG, tensors, 3)
    words = save_tokenizer(source)
    (source / "special_tokens_map.json").write_text('{"eos_token": "b"}')
    flags = ["--shard-gb", "1e-5"]
    convert_there_and_back(source, tmp_path / "ours", tmp_path / "out", *flags)
    assert_same(tensors_of(tmp_path / "out"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.items() >= (CONFIG.to_dict() | {"torch_dtype": np.dtype(dtype).name}).items()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == words
    assert (tmp_path / "out" / "special_tokens_map.json").read_text() == '{"eos_token": "b"}'
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert np.dtype(dtype).name in capsys.readouterr().out
    model = load_model(find_checkpoint(tmp_path / "ours"))
    assert model.dtype == np.dtype(dtype).name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "ours", "out"]
    (tmp_path / "ours" / "tokenizer.json").write_text("[]")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mdn-convert: error: tokenizer: expected the tokenizer.json of the ")
    assert not (tmp_path / "again").exists()


def test_types_can_be_converted(tmp_path):
    tensors = published(CONFIG)
    source = make_folder(tmp_path / "in", CONFIG, tensors)
    convert_there_and_back(source, tmp_path / "ours", tmp_path / "out", "--dtype", "bfloat16")
    low = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    assert_same(tensors_of(tmp_path / "out"), low)
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "up"), "--dtype", "float32"]) == 0
    params = read_params(find_checkpoint(tmp_path / "up"))
    assert params["embeddings"].dtype == np.float32


def _missing(path):
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors | {"extra": np.zeros(3, np.float32)}, path / "model.safetensors")


def _truncated(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing, ["missing model.norm.weight [16]", "unexpected extra [3]"]),
        (_truncated, ["model.safetensors", "damaged"]),
        (lambda path: (path / "config.json").unlink(), ["config.json", "readable"]),
    ],
)
def test_a_bad_folder_leaves_nothing_behind(tmp_path, capsys, damage, words):
    source = make_folder(tmp_path / "in", CONFIG, published(CONFIG))
    damage(source)
    assert main(["import", str(source), str(tmp_path / "ours")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mdn-convert: error: ")
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error, error
    assert list(tmp_path.iterdir()) == [source]


def test_a_failed_write_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    source = make_folder(tmp_path / "in", CONFIG, published(CONFIG))
    save_model = convert.save_model

    def fail(directory, config, params):
        save_model(directory, config, params)
        raise OSError("no space left")

    monkeypatch.setattr(convert, "save_model", fail)
    assert main(["import", str(source), str(tmp_path / "ours")]) == 1
    assert "no space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_what_is_there_is_left_alone(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 1
    assert "output: expected a path where nothing is yet" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert main(["export", str(tmp_path), str(tmp_path / "new")]) == 1
    assert "checkpoint: expected the output directory" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def _no_metadata(state):
    (state / "_METADATA").write_text("{")


@pytest.mark.parametrize(
    "damage", [_no_metadata, lambda state: shutil.rmtree(state.parent / "run")]
)
def test_a_damaged_checkpoint_is_one_clear_error(checkpoint, tmp_path, capsys, damage):
    shutil.copytree(checkpoint, tmp_path / "a")
    damage(tmp_path / "a" / "checkpoints" / "0" / "state")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mdn-convert: error: checkpoint: expected a complete one"), error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_damaged_tensors_are_one_clear_error(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "a")
    for file in (tmp_path / "a" / "checkpoints" / "0" / "state" / "d").iterdir():
        file.write_bytes(b"")
    command = [sys.executable, "-m", "mdn_jax.cli.convert", "export", "a", "out"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60
    )
    assert result.returncode == 1
    assert result.stderr.startswith("mdn-convert: error: checkpoint: expected a complete one")
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_a_run_can_be_exported_and_a_conversion_trained(run, tmp_path):
    config, trained = run
    assert main(["export", str(config.directory), str(tmp_path / "pub")]) == 0
    assert main(["import", str(tmp_path / "pub"), str(tmp_path / "ours")]) == 0
    saved = find_checkpoint(tmp_path / "ours")
    assert saved.model.to_dict().items() >= config.model.to_dict().items()
    _, params = split_model(load_model(saved))
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(trained.state.params), strict=True):
        np.testing.assert_array_equal(x, y)
    resumed = dataclasses.replace(config, output_dir=str(tmp_path / "ours"), resume=True)
    result = train(resumed)
    assert int(result.state.step) == config.steps
    assert find_checkpoint(tmp_path / "ours").step == config.steps
    assert result.held_out_loss < trained.held_out_loss
    other = dataclasses.replace(
        resumed,
        model=dataclasses.replace(config.model, tau_factor=3.0),
        output_dir=str(tmp_path / "again"),
    )
    assert main(["import", str(tmp_path / "pub"), str(tmp_path / "again")]) == 0
    with pytest.raises(Exception, match=r"model\.tau_factor: the checkpoint has 1.0, this run 3.0"):
        train(other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["import", "export"]),
        (["import", "x"], ["PATH"]),
        (["export", "x", "y", "--shard-gb", "0"], ["shard_gb: expected a number > 0"]),
    ],
)
def test_a_bad_command_line_is_one_clear_message(capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.out + captured.err


def test_a_model_keeps_its_parameters(checkpoint):
    saved = find_checkpoint(checkpoint)
    model = load_model(saved, dtype="bfloat16", implementation="scan")
    assert model.dtype == "bfloat16"
    expected = MDNForCausalLM(saved.model, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.embeddings[...], expected.embeddings[...])


def test_an_exported_folder_has_what_other_tools_look_for(run, tmp_path, capsys):
    config, _ = run
    assert main(["export", str(config.directory), str(tmp_path / "bytes")]) == 0
    card = (tmp_path / "bytes" / "README.md").read_text()
    assert "library_name: mdn-jax" in card
    assert f"Trained for {config.steps} steps of {config.batch_size} rows" in card
    assert "Loss on held-out text: " in card
    published_config = json.loads((tmp_path / "bytes" / "config.json").read_text())
    assert published_config["architectures"] == ["MomentumDeltaNetForCausalLM"]
    assert "eos_token_id" not in published_config
    assert json.loads((tmp_path / "bytes" / "generation_config.json").read_text()) == {}
    assert not (tmp_path / "bytes" / "tokenizer_config.json").exists()
    capsys.readouterr()
    (text,) = {said_by(path, capsys) for path in (config.directory, tmp_path / "bytes")}
    assert len(text) > 4


def said_by(directory, capsys):
    """A text by the model, wherever it lies."""
    flags = ["--prompt", "x = ", "--max-new-tokens", "6", "--implementation", "scan"]
    assert generate.main([str(directory), *flags]) == 0
    return capsys.readouterr().out


def test_ids_and_names_come_from_the_tokenizer(tmp_path):
    plain = dataclasses.replace(CONFIG, extras=())
    source = make_folder(tmp_path / "in", plain, published(plain))
    save_tokenizer(source)
    convert_there_and_back(source, tmp_path / "ours", tmp_path / "out")

    def fields(name):
        return json.loads((tmp_path / "out" / name).read_text())

    assert fields("config.json")["eos_token_id"] == 2
    assert fields("generation_config.json") == {"eos_token_id": 2}
    named = fields("tokenizer_config.json")
    assert named["eos_token"] == "<|endoftext|>"
    assert named["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "bos_token" not in named
    assert "Trained for" not in (tmp_path / "out" / "README.md").read_text()

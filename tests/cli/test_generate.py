"""mdn-generate as a user meets it."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mdn_jax import Sampling, generate
from mdn_jax.cli.generate import main
from mdn_jax.models import load_state, steps
from mdn_jax.models.fused import fused_lacks, fused_structure
from mdn_jax.ops.state import kept_as
from mdn_jax.saved.model import find_checkpoint, load_model, save_model
from mdn_jax.text.tokenizer import decode, encode
from tests.kernels.test_decoding import CONFIG, drawn
from tests.tiny import break_model, chain_model
from train.step import split_model

SCAN = ["--implementation", "scan", "--block", "8"]


def output(capsys, *arguments):
    assert main([str(x) for x in arguments]) == 0
    return capsys.readouterr()


def test_text_goes_on_after_the_prompt(checkpoint, capsys):
    captured = output(
        capsys, checkpoint, *SCAN, "--prompt", "dé", "--max-new-tokens", 9, "--temperature", 0
    )
    model = load_model(find_checkpoint(checkpoint), implementation="scan")
    sampling = Sampling(temperature=0.0, vocab_limit=256)
    prompt = encode("dé".encode()).tolist()
    piece = generate(model, [prompt], max_new_tokens=9, block=8, sampling=sampling)
    assert captured.out == "dé" + decode(piece.tokens[0]) + "\n"
    figures = r"9 tokens, the first after [\d.]+ s \(compilation included\), then [\d.,]+ tokens/s"
    assert re.fullmatch(figures, captured.err.strip())


def test_several_prompts_are_each_alone(checkpoint, capsys):
    options = [*SCAN, "--max-new-tokens", 9]
    captured = output(capsys, checkpoint, *options, "--prompt", "ab", "bcd", "--seed", 5)
    alone = [
        output(capsys, checkpoint, *options, "--prompt", text, "--seed", 5 + row).out
        for row, text in enumerate(("ab", "bcd"))
    ]
    assert captured.out == f"=== 0 ===\n{alone[0]}=== 1 ===\n{alone[1]}"


def test_states_save_the_prompt(checkpoint, tmp_path, capsys):
    options = [*SCAN, "--prompt", "one two"]
    whole = output(capsys, checkpoint, *options, "--max-new-tokens", 17).out
    state = tmp_path / "state"
    first = output(capsys, checkpoint, *options, "--max-new-tokens", 8, "--save-state", state)
    assert f"state after 16 tokens in {state}" in first.err
    rest = output(capsys, checkpoint, *SCAN, "--max-new-tokens", 9, "--load-state", state)
    if "\ufffd" not in whole:
        assert first.out[:-1] + rest.out == whole
    more = output(
        capsys, checkpoint, *SCAN, "--max-new-tokens", 9, "--load-state", state, "--prompt", "!"
    )
    assert more.out.startswith("!")


def test_states_of_16_bits_are_saved_so(checkpoint, tmp_path, capsys):
    options = [*SCAN, "--prompt", "one two", "--max-new-tokens", 8, "--state-dtype", "bfloat16"]
    output(capsys, checkpoint, *options, "--save-state", tmp_path / "state")
    model = load_model(find_checkpoint(checkpoint), implementation="scan")
    state = load_state(tmp_path / "state", model)
    assert kept_as(state.cache[0].state) == "bfloat16"


def test_steps_by_kernels_give_the_same_text(tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(CONFIG, vocab_size=257)
    save_model(tmp_path / "model", config, split_model(drawn(config))[1])
    options = [tmp_path / "model", "--block", 8, "--prompt", "ab", "c", "--max-new-tokens", 12]
    layers = output(capsys, *options, "--save-state", tmp_path / "layers").out
    called = []
    monkeypatch.setattr(steps, "fused_lacks", partial(fused_lacks, interpret=True))
    monkeypatch.setattr(
        steps,
        "fused_structure",
        lambda model: called.append(model) or fused_structure(model, interpret=True),
    )
    options += ["--steps", "kernels"]
    assert output(capsys, *options, "--load-state", tmp_path / "layers").out.startswith("=== 0")
    assert output(capsys, *options).out == layers
    assert len(called) == 2


def test_log_probabilities_go_to_a_file(checkpoint, tmp_path, capsys):
    path = tmp_path / "logprobs.jsonl"
    options = [*SCAN, "--prompt", "dé", "--max-new-tokens", 9, "--temperature", 0]
    # an "A" has what no other byte makes good
    options += ["--min-p", 0.1, "--logit-bias", ord("A"), 100, "--vocab-limit", 256]
    assert output(capsys, checkpoint, *options, "--logprobs", path, "--likeliest", 2).out == (
        "dé" + 9 * "A" + "\n"
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["row"], line["token"]) for line in lines] == [(0, ord("A"))] * 9
    for line in lines:
        (_, first), (_, second) = line["likeliest"]
        assert line["logprob"] <= first < 0
        assert second <= first


def test_stop_tokens_are_not_shown(checkpoint, capsys):
    options = [*SCAN, "--prompt", "x", "--temperature", 0, "--max-new-tokens", 9]
    model = load_model(find_checkpoint(checkpoint), implementation="scan")
    piece = generate(
        model,
        [encode(b"x").tolist()],
        max_new_tokens=9,
        block=8,
        sampling=Sampling(temperature=0.0, vocab_limit=256),
    )
    stop = piece.tokens[0][4]
    until = piece.tokens[0][: piece.tokens[0].index(stop)]
    captured = output(capsys, checkpoint, *options, "--stop-tokens", stop)
    assert captured.out == "x" + decode(until) + "\n"
    assert captured.err.startswith(f"{len(until) + 1} tokens")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A model of words: the, cat, sats, the end; then the again, and sat after what is no word."""
    directory = tmp_path_factory.mktemp("chain") / "model"
    words = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3, "##s": 4, "[SEP]": 5}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 5)]
    )
    model = chain_model([3, 2, 3, 4, 5, 1])
    for name, one in (("model", model), ("nan", break_model(model))):
        save_model(directory.parent / name, model.config, split_model(one)[1])
        tokenizer.save(str(directory.parent / name / "tokenizer.json"))
    return directory


def test_text_ends_at_the_end_token_unless_told_otherwise(chain, capsys):
    options = [*SCAN, "--temperature", 0, "--max-new-tokens", 5, "--prompt"]
    assert output(capsys, chain, *options, "the").out == "the cat sats\n"
    assert output(capsys, chain, *options, "the", "--stop-tokens", 3).out == "the cat\n"
    assert output(capsys, chain, *options, "the", "--ignore-end").out == "the cat sats the\n"


def test_special_tokens_of_a_prompt(chain, capsys):
    options = [*SCAN, "--temperature", 0, "--max-new-tokens", 2, "--prompt", "cat [SEP]"]
    assert output(capsys, chain, *options).out == "cat [SEP] the cat\n"
    # of "[", "SEP" and "]" none is a word
    assert output(capsys, chain, *options, "--no-special-tokens").out == "cat [SEP] sats\n"


def test_a_diverged_model_generates_nothing(chain, capsys):
    options = [*SCAN, "--max-new-tokens", "5", "--prompt", "the"]
    assert main([str(chain.parent / "nan"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mdn-generate: error: model: expected logits to draw from, got nan")
    assert len(error.splitlines()) == 1


def test_prompt_files(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt").write_bytes(b"ab\xff")
    options = [*SCAN, "--max-new-tokens", 1, "--prompt-file"]
    captured = output(capsys, checkpoint, *options, tmp_path / "prompt")
    assert captured.out.startswith("ab\ufffd")
    assert main([str(checkpoint), *SCAN, "--prompt", "a", "--prompt-file", "b"]) == 1
    assert "prompt: expected none with prompt_file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "7"], ["step: expected one of [0]", "got 7"]),
        (["--load-state", "nothing"], ["No such file", "nothing"]),
        (["--stop-tokens", "300"], ["stop_tokens", "0 to 256", "300"]),
        (["--tokenizer", "nothing.json"], ["tokenizer", "nothing.json"]),
        (["--steps", "kernels"], ['steps: "kernels" expects ', "got 'scan'", 'use "layers"']),
        (
            ["--steps", "kernels", "--state-dtype", "float16_scaled"],
            ['steps: expected "layers" with state_dtype \'float16_scaled\', got "kernels"'],
        ),
    ],
)
def test_an_error_is_one_clear_line(checkpoint, capsys, arguments, words):
    assert main([str(checkpoint), *SCAN, "--max-new-tokens", "1", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mdn-generate: error: ")
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error


def test_a_directory_without_a_checkpoint(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "mdn-generate: error: checkpoint: expected the output directory of a run"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required", "PATH"]),
        (["x", "--temperature", "-1"], ["temperature: expected a number >= 0", "-1"]),
        (["x", "--top-q", "1"], ["--top-q"]),
    ],
)
def test_a_bad_command_line_is_one_clear_message(capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr()
    message = " ".join((captured.out + captured.err).replace("│", " ").split())
    for word in words:
        assert word in message, message


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--temperature", "--top-k", "--top-p", "--seed", "--save-state", "--dtype"):
        assert flag in text


@pytest.mark.slow
def test_ctrl_c_keeps_what_there_is(checkpoint, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "mdn_jax.cli.generate", str(checkpoint), *SCAN]
    command += ["--prompt", "start:", "--max-new-tokens", "100000000"]
    command += ["--save-state", str(tmp_path / "state")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    begun = process.stdout.read(len("start:") + 40)
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert begun.startswith(b"start:")
    assert (begun + rest).endswith(b"\n")
    assert b"tokens/s" in error
    assert b"Traceback" not in error
    assert process.returncode == 130
    with np.load(tmp_path / "state") as state:
        assert state["position"][0] > len("start:") + 8  # a broken character shows as 3 bytes


def test_the_place_of_the_state_is_checked_first(tmp_path, capsys):
    """Before the checkpoint is read, which there is none of."""
    place = tmp_path / "nowhere" / "state.npz"
    assert main([str(tmp_path), "--save-state", str(place)]) == 1
    assert capsys.readouterr().err.endswith(f"No such file or directory: '{place}'\n")

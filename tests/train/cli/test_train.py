import subprocess
import sys

import pytest

from tests.tiny import TINY_MODEL
from tests.train.helpers import TINY_RUN
from train.checkpointing.run_directory import only_run
from train.cli.train import main, parse


def flags(corpus, output, **changes):
    values = {f"model.{name}": value for name, value in TINY_MODEL.items()}
    values |= TINY_RUN | {"optimizer.warmup_steps": 1, "output_dir": output} | changes
    texts = [
        x for name, value in values.items() for x in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["smoke", *texts, "--data.files", str(corpus / "*.txt")]


@pytest.mark.slow
def test_end_to_end(corpus, tmp_path, capsys):
    """A process trains; another one, this one, resumes."""
    arguments = flags(corpus, tmp_path / "run")
    command = [sys.executable, "-W", "error", "-m", "train", *arguments]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    out = first.stdout
    assert f"{tmp_path / 'run'}: config.json has the whole configuration\n" in out
    assert len(out.partition("sample at")[0].splitlines()) < 8
    assert "sample at temperature" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("held-out loss ")
    assert "unigram entropy of the same bytes" in last
    assert last.endswith(("better", "worse"))
    for name in ("checkpoints/6", "config.json", "metrics.jsonl", "loss.png", "sample.txt"):
        assert (tmp_path / "run" / name).exists(), name

    assert main(arguments) == 1
    assert "output_dir: expected a directory without a run" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "resumed after step 6 of 6" in out
    assert out.strip().splitlines()[-1] == last
    assert main([*arguments, "--resume", "--optimizer.weight-decay", "0.2"]) == 1
    assert "optimizer.weight_decay: the checkpoint has 0.1, this run 0.2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["configuration: expected a recipe"]),
        (["smok"], ["got 'smok'", "smoke", "mdn_400m"]),
        (["smoke", "--optimizer.learning-rte", "1"], ["--optimizer.learning-rte", "Perhaps"]),
        (["smoke", "--steps", "many"], ["--steps", "'many'"]),
        (["smoke", "--steps", "0"], ["steps: expected an int >= 1, got 0"]),
        (["smoke", "--dtype", "float8"], ["'float8'", "'--dtype'", "bfloat16"]),
        (["smoke", "--model.head-dim", "0"], ["model: head_dim: expected an int >= 1"]),
        (["smoke", "--model.attn", "{}"], ["--model.attn", "num_heads"]),
    ],
)
def test_a_bad_command_line_is_one_clear_message(arguments, expected, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr()
    message = " ".join((captured.out + captured.err).replace("│", " ").split())
    for text in expected:
        assert text in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("*.md", "x", "data.files: expected a file or a glob that matches files"),
        ("*.txt", "", "data.files: expected files with text in them"),
        ("*.txt", "short", "data.files: expected at least sequence_length + 1 = 257 tokens"),
    ],
)
def test_a_bad_corpus_is_one_clear_message(tmp_path, capsys, pattern, text, expected):
    (tmp_path / "a.txt").write_text(text)
    output = tmp_path / "run"
    arguments = ["smoke", "--data.files", str(tmp_path / pattern), "--output-dir", str(output)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"python -m train: error: {expected}")
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_a_recipe_without_data_is_an_error_that_says_what_to_add(tmp_path, capsys):
    assert main(["mdn_400m", "--output-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "python -m train: error: data: expected documents to train on, got none"
    )
    assert [line.split()[0] for line in error.splitlines()[1:]] == [
        "--data.files",
        "--data.dataset",
    ]


def test_a_second_run_is_one_clear_message(corpus, tmp_path, capsys):
    with only_run(tmp_path / "run"):
        assert main(flags(corpus, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "python -m train: error: output_dir: expected a directory that no other run"
    )
    assert len(error.splitlines()) == 1


def test_flags_reach_nested_fields():
    attention = '{"layers": [1], "num_heads": 4}'
    files = ["--data.files", "a", "b"]
    config = parse(
        [
            "smoke",
            "--optimizer.learning-rate",
            "1e-3",
            *files,
            "--resume",
            "--model.attn",
            attention,
        ]
    )
    assert config.optimizer.learning_rate == 1e-3
    assert config.data.files == ("a", "b")
    assert config.resume
    assert config.model.attn is not None
    assert config.model.attn.layers == (1,)
    assert parse(["hybrid_400m_3to1", "--model.attn", "None"]).model.attn is None


def test_help_names_the_configurations_and_every_field(capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--help"])
    assert error.value.code == 0
    assert "hybrid_400m_7to1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        parse(["smoke", "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--steps", "--resume", "--data.files", "--optimizer.clip-norm", "--model.attn"):
        assert flag in text

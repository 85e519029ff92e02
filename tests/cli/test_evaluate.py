"""mdn-eval as a user meets it."""

import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mdn_jax.cli.evaluate import main
from mdn_jax.saved.model import find_checkpoint, load_model, save_model
from mdn_jax.text.tokenizer import encode
from tests.evaluation.test_token_losses import naive
from tests.text.helpers import write_jsonl
from tests.tiny import break_model, chain_model
from train.step import split_model

SCAN = ["--implementation", "scan", "--batch-size", "4"]


def results(capsys, *arguments):
    assert main([str(x) for x in arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(find_checkpoint(checkpoint), implementation="scan")


def test_perplexity_is_that_of_numpy(checkpoint, model, tmp_path, capsys):
    texts = ["some text, and some more é", "other", ""]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    losses = np.concatenate([naive(model, encode(t.encode())) for t in texts if t])
    common = [checkpoint, *SCAN, "--files", tmp_path / "*.txt", "--window", 32]
    lines = write_jsonl(tmp_path / "a.jsonl", texts)
    for mode in ("strided", "packed"):
        window = 32 if mode == "strided" else 64  # a row of all documents
        options = [*common, "--mode", mode, "--window", window, "--json"]
        options += ["--files", lines] if mode == "packed" else []
        result = results(capsys, "perplexity", *options)
        mean = losses.mean()
        assert result["nats_per_token"] == pytest.approx(mean, rel=1e-5)
        assert result["nats_per_byte"] == result["nats_per_token"]
        assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert result["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5)
        assert (result["tokens"], result["bytes"], result["documents"]) == (32, 32, 2)
    assert main(["perplexity", *map(str, common)]) == 0
    table = capsys.readouterr().out
    assert f"nats per byte   {losses.mean():.4f}" in table


QUESTIONS = [
    {"question": "two and two is", "choices": ["four", "a fish", "é"], "answer": 0},
    {"context": "the sky is", "choices": ["green", "blue"], "answer": 1, "id": 7},
]


def test_choices_are_those_of_numpy(checkpoint, model, tmp_path, capsys):
    file, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("\n\n".join(map(json.dumps, QUESTIONS)) + "\n")
    result = results(
        capsys, "choices", checkpoint, *SCAN, "--file", file, "--output", output, "--json"
    )
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    right, by_length = [], []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        context = question.get("question") or question["context"]
        scores = []
        for choice in question["choices"]:
            losses = naive(model, encode(f"{context} {choice}".encode()))
            scores.append(-losses[-len(f" {choice}".encode()) :].sum())
        np.testing.assert_allclose(answer["log_likelihoods"], scores, rtol=1e-5)
        lengths = [len(choice.encode()) for choice in question["choices"]]
        right.append(int(np.argmax(scores)) == question["answer"])
        by_length.append(int(np.argmax(np.divide(scores, lengths))) == question["answer"])
    assert result["accuracy"] == np.mean(right)
    assert result["accuracy_by_length"] == np.mean(by_length)
    assert result["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result["questions"] == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["Expecting property name"]),
        ("[]", ["expected a JSON object", "list"]),
        ('{"choices": ["a", "b"], "answer": 0}', ["context, question", "neither"]),
        ('{"context": "", "question": "", "choices": ["a", "b"]}', ["expected one of the two"]),
        ('{"context": 3, "choices": ["a", "b"], "answer": 0}', ["context", "a string", "3"]),
        ('{"context": "", "choices": ["a"], "answer": 0}', ["choices", "two or more", "['a']"]),
        ('{"context": "", "choices": ["a", ""], "answer": 0}', ["choices", "none empty"]),
        ('{"context": "", "choices": ["a", "b"], "answer": 2}', ["answer", "0 to 1", "got 2"]),
        ('{"context": "", "choices": ["a", "b"], "answer": true}', ["answer", "got True"]),
        ('{"context": "", "choices": ["a", "b"]}', ["answer", "None"]),
        (r'{"context": "\udce9", "choices": ["a", "b"]}', ["context", "Unicode", "surrogates"]),
        (r'{"question": "", "choices": ["a", "\ud83d"]}', ["choices", "Unicode", "surrogates"]),
        ("[" * 100_000, ["less deeply nested"]),
    ],
)
def test_bad_questions_are_named_by_line(tmp_path, capsys, line, words):
    file = tmp_path / "q.jsonl"
    file.write_text(f"{json.dumps(QUESTIONS[0])}\n\n{line}\n")
    assert main(["choices", "nothing", "--file", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"mdn-eval: error: {file}:3: ")
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error, error


def test_questions_that_cannot_be_scored_are_named_by_line(tmp_path, capsys):
    words = {"a": 0, "b": 1, "c": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="c"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    model, file = chain_model([1, 2, 0]), tmp_path / "q.jsonl"
    for name, one in (("good", model), ("nan", break_model(model))):
        save_model(tmp_path / name, model.config, split_model(one)[1])

    def ask(directory, *questions):
        lines = [json.dumps({"context": x, "choices": y, "answer": 0}) for x, y in questions]
        file.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
        options = ["--file", str(file), "--tokenizer", str(tmp_path / "words.json"), *SCAN]
        status = main(["choices", str(tmp_path / directory), *options, "--json"])
        return status, capsys.readouterr()

    fine = ("a", ["b", "c"])
    status, captured = ask("good", fine, ("a b", ["c", "a"]))
    assert (status, json.loads(captured.out)["accuracy"]) == (0, 1.0)
    for directory, line, question, expected in (
        ("good", 2, ("a", ["b", "  "]), "continuation: expected text with a token of its own"),
        ("good", 2, ("", ["b", "c"]), "context: expected text, as no token"),
        ("nan", 1, fine, "choices[0]: expected finite log-likelihoods of the model, got nan"),
    ):
        status, captured = ask(directory, fine, question)
        assert (status, captured.out) == (1, "")
        assert captured.err.startswith(f"mdn-eval: error: {file}:{line}: {expected}")
        assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "files", "words"),
    [
        ("", "*.txt", ["files: expected files with text in them"]),
        ("x", "*.md", ["files: expected a file or a glob", "*.md"]),
    ],
)
def test_bad_files(tmp_path, capsys, text, files, words):
    (tmp_path / "a.txt").write_text(text)
    assert main(["perplexity", "nothing", "--files", str(tmp_path / files)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mdn-eval: error: files: ")
    for word in words:
        assert word in error


def test_a_file_of_questions_that_is_not_there(tmp_path, capsys):
    assert main(["choices", "nothing", "--file", str(tmp_path / "q")]) == 1
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "q").write_text("\n")
    assert main(["choices", "nothing", "--file", str(tmp_path / "q")]) == 1
    assert "expected at least one question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["perplexity", "choices"]),
        (["perplexity", "x"], ["--files"]),
        (["perplexity", "x", "--files", "a", "--window", "0"], ["window: expected an int >= 1"]),
        (
            ["perplexity", "x", "--files", "a", "--stride", "2000"],
            ["stride: expected an int from 1 to window = 1024", "2000"],
        ),
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


@pytest.mark.parametrize("command", ["perplexity", "choices"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    assert "--json" in capsys.readouterr().out

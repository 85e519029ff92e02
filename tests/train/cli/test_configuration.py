"""What a run begins with: recipes, files, Python files, runs; and what it says of itself."""

import dataclasses
import json
import tomllib

import pytest

from configs import CONFIGS
from mdn_jax.saved.digest import Digests
from mdn_jax.saved.record import RECORD, make_record
from train.cli.configuration import parse
from train.config import TrainConfig, from_dict, to_dict

TOML = """
recipe = "smoke"
steps = 77
[model]
hidden_size = 64
attn = {layers = [1], num_heads = 4}
[optimizer]
learning_rate = 1e-3
[data]
files = ["a.txt", "b/**"]
"""


def write(path, text):
    path.write_text(text)
    return str(path)


def refused(capsys, *arguments):
    """The one line of a command line that does not fit."""
    with pytest.raises(SystemExit) as end:
        parse([str(x) for x in arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m train: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("python -m train: error: ")


def save_record(directory, step, config, corpus="c"):
    """A checkpoint, as far as the configuration is read from it."""
    place = directory / "checkpoints" / str(step) / RECORD
    place.mkdir(parents=True)
    values = to_dict(config.resolved()) if isinstance(config, TrainConfig) else config
    digests = Digests("mixed sum", {})
    record = make_record(step, config=values, corpus=corpus, digests=digests)
    (place / "metadata").write_text(json.dumps(record))


def test_a_file_changes_a_recipe_and_flags_change_both(tmp_path):
    config = parse([write(tmp_path / "a.toml", TOML), "--steps", "99"])
    smoke = CONFIGS["smoke"]()
    assert config.steps == 99
    assert (config.model.hidden_size, config.optimizer.learning_rate) == (64, 1e-3)
    assert config.model.attn is not None
    assert config.model.attn.layers == (1,)
    assert config.data.files == ("a.txt", "b/**")
    assert config.model.num_heads == smoke.model.num_heads
    assert config.optimizer.warmup_steps == smoke.optimizer.warmup_steps
    assert config.fit_vocab_size


def test_the_formats_say_the_same(tmp_path):
    values = tomllib.loads(TOML)
    files = [
        write(tmp_path / "a.toml", TOML),
        write(tmp_path / "a.json", json.dumps(values)),
        write(
            tmp_path / "a.yaml",
            "recipe: smoke\nsteps: 77\nmodel:\n  hidden_size: 64\n"
            "  attn: {layers: [1], num_heads: 4}\n"
            "optimizer: {learning_rate: 1e-3}\ndata:\n  files: [a.txt, b/**]\n",
        ),
    ]
    first, *others = [parse([file]) for file in files]
    assert others == [first, first]


def test_the_vocabulary_size_that_is_given_is_kept(tmp_path):
    assert parse(["mdn_400m"]).fit_vocab_size
    assert not parse(["mdn_400m", "--model.vocab-size", "60000"]).fit_vocab_size
    given = write(tmp_path / "a.toml", 'recipe = "smoke"\nmodel.vocab_size = 300')
    assert not parse([given]).fit_vocab_size
    assert parse([write(tmp_path / "b.json", '{"steps": 2000}')]).fit_vocab_size


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
def test_what_is_saved_is_read_again(tmp_path, capsys, suffix):
    path = tmp_path / f"saved{suffix}"
    arguments = ["hybrid_400m_3to1", "--steps", "2000", "--model.min-log-mu", "None"]
    with pytest.raises(SystemExit) as end:
        parse([*arguments, "--save-config", str(path)])
    assert end.value.code == 0
    assert parse([str(path)]) == parse(arguments)
    with pytest.raises(SystemExit) as end:
        parse([str(path), "--print-config"])
    assert end.value.code == 0
    printed = write(tmp_path / "printed.toml", capsys.readouterr().out)
    assert parse([printed]) == parse(arguments)


def test_the_file_of_a_run_is_a_configuration(tmp_path):
    config = dataclasses.replace(CONFIGS["smoke"](), steps=123, resume=True).resolved()
    read = parse([write(tmp_path / "config.json", json.dumps(to_dict(config)))])
    assert read == dataclasses.replace(config, resume=False)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "stepz = 1", "stepz: expected one of ["),
        ("a.toml", "steps = ", "Invalid value"),
        ("a.toml", "steps = 1.5", "steps: expected an int, got 1.5"),
        ("a.toml", "steps = true", "steps: expected an int, got True"),
        ("a.toml", "steps = 0", "steps: expected an int >= 1, got 0"),
        ("a.toml", "data = 3", "data: expected a JSON object, got 3"),
        ("a.toml", 'data.files = "x"', "data.files: expected a list of strings, got 'x'"),
        ("a.toml", "data.files = [1]", "data.files[0]: expected a string, got 1"),
        ("a.toml", 'dtype = "half"', "dtype: expected one of 'float32', 'bfloat16', got 'half'"),
        ("a.toml", "model.head_dim = 0", "model.head_dim: expected an int >= 1, got 0"),
        ("a.toml", 'recipe = "smok"', "recipe: expected one of smoke, "),
        ("a.json", "[1]", "expected fields with values, got [1]"),
        ("a.json", "{", "Expecting property name"),
        ("a.yaml", "a: [", "while parsing a flow node"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, capsys, name, text, expected):
    error = refused(capsys, write(tmp_path / name, text))
    assert error.startswith(f"{tmp_path / name}: {expected}")


def test_yaml_without_its_package_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    assert "the extra 'train'" in refused(capsys, write(tmp_path / "a.yaml", "steps: 1"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "configuration: expected a recipe, a file or a directory, got none"),
        (("smok",), "configuration: expected one of smoke, "),
        (("none.toml",), "configuration: expected a file that can be read, got none.toml"),
        (("smoke", "--save-config", "a.txt"), "save_config: expected a file named .toml"),
        (("--resume",), "output_dir: expected the directory of the run to resume, got none"),
        (("--resume", "--output-dir", "none"), "configuration: expected a run in none, got none"),
    ],
)
def test_nothing_to_begin_with_is_one_line(capsys, arguments, expected):
    assert refused(capsys, *arguments).startswith(expected)


RECIPE = '''
from train.config import TrainConfig

def config():
    """Mine.

    And more."""
    return TrainConfig(name="mine", steps=5000)

other = TrainConfig(name="other", steps=6000)
number = 3
def broken():
    return 1 / 0
'''


def test_a_recipe_in_a_python_file(tmp_path, capsys):
    path = write(tmp_path / "my_recipe.py", RECIPE)
    assert parse([path, "--seed", "3"]) == TrainConfig(name="mine", steps=5000, seed=3)
    assert parse([f"{path}:other"]).name == "other"
    assert "expected a TrainConfig as number" in refused(capsys, f"{path}:number")
    assert "got none" in refused(capsys, f"{path}:none")
    assert "ZeroDivisionError: division by zero" in refused(capsys, f"{path}:broken")
    assert "FileNotFoundError" in refused(capsys, tmp_path / "gone.py")


def test_the_recipe_of_the_examples():
    assert parse(["examples/own_recipe.py"]).name == "own"
    assert parse(["examples/own_recipe.py:longer"]).steps == 5000


def test_a_run_resumes_with_what_it_has(tmp_path, capsys):
    run = tmp_path / "run"
    made = parse(["smoke", "--steps", "50", "--model.hidden-size", "64", "--data.files", "a"])
    save_record(run, 20, dataclasses.replace(made, resume=True))
    saved = dataclasses.replace(made.resolved(), output_dir=str(run), resume=True)
    for begin in (
        [str(run), "--resume"],
        ["--resume", "--output-dir", str(run)],
        ["smoke", "--resume", "--output-dir", str(run)],
    ):
        assert parse(begin) == saved
    assert parse([str(run), "--resume", "--steps", "70"]).steps == 70
    longer = write(tmp_path / "a.toml", 'recipe = "mdn_400m"\nlog_every = 3')
    assert parse([longer, "--resume", "--output-dir", str(run)]) == dataclasses.replace(
        saved, log_every=3
    )
    error = refused(capsys, "mdn_400m", "--resume", "--output-dir", run)
    assert "got mdn_400m, which has another name and another model" in error
    assert "resume: expected --resume with" in refused(capsys, run)


def test_the_configuration_of_a_damaged_checkpoint_is_not_taken(tmp_path, capsys):
    run = tmp_path / "run"
    for step, steps in ((10, 50), (20, 60)):
        save_record(run, step, parse(["smoke", "--steps", str(steps)]))
    assert parse([str(run), "--resume"]).steps == 60
    assert parse([str(run), "--resume", "--resume-step", "10"]).steps == 50
    record = run / "checkpoints" / "20" / RECORD / "metadata"
    record.write_text(record.read_text().replace('"steps": 60', '"steps": 61'))
    assert parse([str(run), "--resume"]).steps == 50
    record.parent.parent.parent.joinpath("10", RECORD, "metadata").write_text("")
    assert "wrong digest" in refused(capsys, run, "--resume")


def test_a_run_from_before_had_the_standard_library(tmp_path):
    values = to_dict(parse(["smoke"]).resolved())
    del values["data"]["standard_library"]
    assert not from_dict(values).data.standard_library
    save_record(tmp_path, 3, values)
    assert parse([str(tmp_path), "--resume"]).data.standard_library


def test_a_converted_model_resumes_with_a_recipe(tmp_path, capsys):
    save_record(tmp_path, 0, {"model": CONFIGS["smoke"]().model.to_dict()}, corpus=None)
    assert "expected that of a run" in refused(capsys, tmp_path, "--resume")
    assert parse(["smoke", "--resume", "--output-dir", str(tmp_path)]).steps == 300


def test_the_tokenizer_of_a_run_stands_in_for_one_that_is_gone(tmp_path):
    made = parse(["smoke", "--data.tokenizer", str(tmp_path / "gone.json")])
    save_record(tmp_path / "run", 3, made)
    own = tmp_path / "run" / "tokenizer.json"
    own.write_text("{}")
    assert parse([str(tmp_path / "run"), "--resume"]).data.tokenizer == str(own)

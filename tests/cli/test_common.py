"""What the commands share."""

from pathlib import Path

import pytest

from mdn_jax.cli import convert, evaluate, inspect_checkpoint
from mdn_jax.cli.common import parse, parse_command
from mdn_jax.cli.generate import GenerateConfig
from train.cli import plot, tokenize
from train.cli.train import parse as parse_train


def paths(value):
    """The paths in a configuration, as they are printed."""
    if isinstance(value, Path):
        return [str(value)]
    entries = value if isinstance(value, tuple) else vars(value).values()
    return [p for x in entries if isinstance(x, (Path, tuple)) for p in paths(x)]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (
            GenerateConfig,
            "~/run --prompt-file ~/a --load-state=~/b --save-state=~/c --tokenizer ~/d",
        ),
        (plot.PlotConfig, "~/run ~/other --output=~/a.png"),
        (inspect_checkpoint.InspectConfig, "~/run --output-dir=~/a --tokenizer=~/b"),
        (tokenize.TokenizeConfig, "~/out --files a"),
    ],
)
def test_a_tilde_is_the_home_directory(monkeypatch, kind, arguments):
    monkeypatch.setenv("HOME", "/home/of x")
    config = parse("it", None, kind, arguments.split())
    found = paths(config)
    assert len(found) == arguments.count("~")
    assert all(path.startswith("/home/of x/") for path in found)


COMMANDS = {
    "import": convert._import,
    "export": convert._export,
    "choices": evaluate._choices,
    "perplexity": evaluate._perplexity,
}


@pytest.mark.parametrize(
    "arguments",
    ["import ~/a ~/b", "export ~/a ~/b", "choices ~/a --file=~/b --output ~/c"],
)
def test_a_tilde_is_the_home_directory_in_subcommands(monkeypatch, arguments):
    monkeypatch.setenv("HOME", "/home/of x")
    (config,) = parse_command("it", None, COMMANDS, arguments.split()).args
    expected = {f"/home/of x/{name}" for name in "abc"[: arguments.count("~")]}
    assert set(paths(config)) == expected


def test_a_tilde_is_the_home_directory_of_a_run(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of x")
    config = parse_train(["smoke", "--output-dir=~/runs/a"])
    assert config.directory == Path("/home/of x/runs/a")
    assert config.resolved().output_dir == "/home/of x/runs/a"


def test_other_tildes_stay(monkeypatch):
    config = parse("it", None, plot.PlotConfig, ["a~", "b/~/c", "~no-such-user/d"])
    assert [str(path) for path in config.runs] == ["a~", "b/~/c", "~no-such-user/d"]

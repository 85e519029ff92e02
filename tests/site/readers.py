"""What is done with a command of a page: it is run, or at least read."""

import importlib.util
import re
import tomllib
from collections.abc import Callable, Sequence

import benchmarks.command
import mdn_jax.cli.convert
import mdn_jax.cli.evaluate
import mdn_jax.cli.generate
import mdn_jax.cli.inspect_checkpoint
import mdn_jax.cli.serve
import train.cli.configuration
import train.cli.plot
import train.cli.tokenize
import train.cli.train
from mdn_jax.cli.common import parse
from tests.site.pages import ROOT

Words = Sequence[str]

RUN: dict[str, Callable[[list[str]], int]] = {
    "mdn-generate": mdn_jax.cli.generate.main,
    "mdn-eval": mdn_jax.cli.evaluate.main,
    "mdn-convert": mdn_jax.cli.convert.main,
    "mdn-inspect": mdn_jax.cli.inspect_checkpoint.main,
    "python -m train tokenize": train.cli.tokenize.main,
    "python -m train plot": train.cli.plot.main,
    "python -m train": train.cli.train.main,
    "python -c": lambda words: exec(words[0], {}) or 0,
}
"""The beginning of a command, and what runs it."""

SMALLER = {
    "mdn-generate": "--implementation scan --max-new-tokens 20",
    "mdn-eval perplexity": "--implementation scan --window 64",
    "mdn-eval choices": "--implementation scan",
    "mdn-inspect": "--implementation scan --batch-size 2 --row 16 --tokens 64",
    "python -m train tokenize": "--processes 1",
}
"""What stands behind the flags of a command that runs, so that little is compiled."""

STEPS, STEPS_OF_RESUMED = "12", "14"
"""In place of what a command gives: one number, for the schedule is part of the compiled step."""

NOT_RUN = {
    r"python -m train (mdn_|hybrid_)": "a model for GPUs",
    r"docker|deploy/|sbatch|kubectl": "several hosts, or a container",
    r"python -m benchmarks": "tests/benchmarks runs each at its smallest size",
    r"mdn-serve|curl": "tests/cli/test_serve.py starts servers, tests/serving asks them",
    r"python examples/": "tests/test_examples.py runs them",
    r"python -m tests\.|pytest": "these are tests",
    r"make (?!train)": "CI runs these targets",
    r"python -m train smoke .*\.venv/lib": "a measurement on 146 MB of text",
    r"python -m train smoke --model.mixer": "tests/models/test_mixers.py has every mixer",
    r"pip|git": "another machine is asked",
    r"source|mkdir": "it is for the reader's shell and home",
}
"""Commands that are only read, and why."""


def find(words: Words) -> tuple[Callable[[list[str]], int], list[str]] | None:
    """What runs a command, and its arguments."""
    line = " ".join(words)
    for begin, main in RUN.items():
        if f"{line} ".startswith(f"{begin} "):
            return main, list(words[len(begin.split()) :])
    return None


def smaller(words: Words) -> list[str]:
    """A command at the sizes of these tests; its recipe `smoke` is smaller besides."""
    words = list(words)
    if "--steps" in words:
        resumed = "--resume" in words
        words[words.index("--steps") + 1] = STEPS_OF_RESUMED if resumed else STEPS
    line = " ".join(words)
    for begin, more in SMALLER.items():
        if line.startswith(begin) and not line.endswith(("--help", "bash")):
            return [*words, *more.split()]
    return words


def made_of(words: Words) -> list[str]:
    """`make TARGET ARGS=...` as the command that it is; any other as it is."""
    match words:
        case ["make", "train", *rest]:
            recipe = re.search(r"^train:.*\n\t@(.*)", (ROOT / "Makefile").read_text(), re.M)
            assert recipe is not None
            arguments = " ".join(x.removeprefix("ARGS=") for x in rest)
            return recipe[1].replace("$(BIN)/", "").replace("$(ARGS)", arguments).split()
    return list(words)


def read(words: Words) -> None:
    """Reads a command as its program would, without running it.

    Raises:
      AssertionError, SystemExit, LookupError: a flag, a name or a file that does not exist.
    """
    match words:
        case ["python", "-m", "train", "tokenize", *rest]:
            parse("it", None, train.cli.tokenize.TokenizeConfig, rest)
        case ["python", "-m", "train", *rest]:
            train.cli.configuration.parse(rest)
        case ["python", "-m", "benchmarks", *rest]:
            benchmarks.command.parse(rest)
        case ["mdn-serve", *rest]:
            parse("it", None, mdn_jax.cli.serve.ServeConfig, rest)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, module
        case ["python", file, *_]:
            name = (ROOT / file).stem
            assert (ROOT / file).is_file(), file
            assert name in (ROOT / "tests" / "test_examples.py").read_text(), f"no test of {name}"
        case ["make", *targets]:
            there = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert not {x for x in targets if "=" not in x} - {*there}, targets
        case ["pip", "install", *rest]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = re.findall(r"\.\[([\w,]+)\]", " ".join(rest))
            named = {name for text in extras for name in text.split(",")}
            assert named <= {*project["optional-dependencies"]}, named
        case ["pytest", path, *_]:
            assert (ROOT / path).exists(), path
        case ["docker", "build", "-f", file, *_] | ["kubectl", "apply", "-f", file]:
            assert (ROOT / file).is_file(), file
        case ["docker", "run", *rest] if "mdn-jax:cuda" in rest:
            train.cli.configuration.parse(rest[rest.index("mdn-jax:cuda") + 1 :])
        case ["sbatch", "--nodes", _, script, *rest] | ["deploy/run.sh" as script, *rest]:
            assert (ROOT / script).is_file(), script
            train.cli.configuration.parse(rest)
        case ["source", ".venv/bin/activate"] | ["mkdir", "-p", _] | ["curl", *_]:
            pass
        case _:
            raise AssertionError("nothing reads it")

"""`python -m train` and `python -m benchmarks` find their commands, and say what is missing."""

import gc
import signal
import sys

import pytest

from mdn_jax import __version__
from mdn_jax.cli.commands import command
from train.__main__ import main


@pytest.fixture(autouse=True)
def _signals_as_before():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before, hook = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    sys.unraisablehook = hook
    gc.unfreeze()


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    return main()


@pytest.mark.parametrize("name", ["", "tokenize", "plot"])
def test_every_command_knows_its_version(monkeypatch, capsys, name):
    program = f"python -m train {name}".strip()
    assert run(monkeypatch, *name.split(), "--version") == 0
    assert capsys.readouterr().out == f"{program} (mdn-jax) {__version__}\n"


def test_help_lists_the_commands(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    for name in ("usage: python -m train", "smoke", "tokenize", "plot"):
        assert name in out


def test_a_command_has_its_own_arguments(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "plot", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m train plot: error: runs: expected a directory with")


def test_what_a_command_imports_is_never_searched_for_garbage(monkeypatch, tmp_path):
    source = "import gc\nsearched = gc.isenabled()\nlasting = [[] for _ in range(1000)]\n"
    (tmp_path / "command_of_this_test.py").write_text(
        f"{source}def main(arguments): return 40 + 2 * gc.isenabled() + searched\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert command("it", "command_of_this_test", []) == 42
    assert gc.get_freeze_count() > 1000


@pytest.mark.parametrize(
    ("program", "module", "extra"),
    [
        ("python -m train", "train.cli.train", "train"),
        ("python -m benchmarks", "benchmarks.command", "benchmarks"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    monkeypatch, capsys, program, module, extra
):
    for name in (module, "train.cli.configuration", "mdn_jax.cli.common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert command(program, module, [], extra=extra) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: error: expected the package tyro, got none: install")
    assert f"the extra '{extra}'" in error
    assert error.count("\n") == 1


def test_a_module_of_ours_that_is_missing_is_a_fault(tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"mdn_jax\.nothing"):
        command("it", "mdn_jax.nothing", [])

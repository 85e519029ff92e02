"""Signals: noted by a loop, and for a command never a stack."""

import signal
import subprocess
import sys

import pytest

from mdn_jax.cli.interrupt import CommandSignals, Interrupt, status_of

# the command is a module that says where it is and waits there
WAIT = "print(1, flush=True); time.sleep(60)"
COMMANDS = {
    "imported": f"import time; {WAIT}",
    "at work": f"import time\ndef main(arguments): {WAIT}",
    "cleaning up": f"import time\ndef main(arguments):\n try: {WAIT}\n finally: {WAIT}",
    "in a loop": "import time\nfrom mdn_jax.cli.interrupt import Interrupt\n"
    "def main(arguments):\n with Interrupt() as interrupt:\n  print(1, flush=True)\n"
    f"  while interrupt.signal is None: time.sleep(0.01)\n  {WAIT}",
    "at its end": f"import atexit, time\natexit.register(lambda: exec('import time; {WAIT}'))\n"
    "def main(arguments): return 0",
    "in a callback": f"import time\nclass A:\n def __del__(self): {WAIT}\n"
    "def main(arguments):\n a = A()\n del a\n time.sleep(60)",
}


def started(directory, module):
    """A process of the command that a module is."""
    (directory / "it.py").write_text(module)
    code = (
        f"import sys; sys.path.append({str(directory)!r})\n"
        "from mdn_jax.cli.commands import command; sys.exit(command('it', 'it'))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("command", "numbers", "status"),
    [
        ("imported", [2], 130),
        ("at work", [15], 143),
        ("cleaning up", [2, 2, 2], 130),
        ("cleaning up", [2, 15], 143),
        ("in a loop", [2, 2], 130),
        ("at its end", [2], 130),
        ("in a callback", [15], 143),
    ],
)
def test_signals_end_a_command_without_a_stack(tmp_path, command, numbers, status):
    with started(tmp_path, COMMANDS[command]) as process:
        for number in numbers:
            process.stdout.readline()  # it has come to where it waits, or ended
            process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert error.strip() == "it: interrupted"


@pytest.mark.parametrize("end", ["return 0", "raise SystemExit(0)"])
def test_a_reader_that_has_enough_ends_a_command_without_a_stack(tmp_path, end):
    with started(tmp_path, f"def main(arguments):\n print(1)\n {end}") as process:
        process.stdout.close()  # as `head` does
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == ""


@pytest.fixture
def as_before():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_before")
def test_a_loop_that_was_told_to_end_is_told_once(monkeypatch):
    ended = []
    monkeypatch.setattr(CommandSignals, "end_now", lambda self, number: ended.append(number))
    signals = CommandSignals("it")
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        assert not ended
        with pytest.raises(KeyboardInterrupt):  # end_now returns here only
            signal.raise_signal(signal.SIGINT)
    assert ended == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signals


def test_the_status_is_that_of_the_signal():
    assert status_of(KeyboardInterrupt()) == 130
    assert status_of(KeyboardInterrupt(signal.SIGTERM)) == 143

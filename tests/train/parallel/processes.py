"""Processes of `python -m train` that a test starts, ends, and hears the last words of."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax

from tests.tiny import TINY_MODEL
from tests.train.helpers import TINY_RUN
from train.cli.train import main
from train.metrics.log import read_metrics
from train.parallel.relay import free_port

SOON = 60.0  # seconds for the others to end, on a machine that has other things to do
ENDLESS = {"steps": 1_000_000, "checkpoint_every": 1_000_000, "eval_every": 1_000_000}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train.cli.train"])  # children start in a moment

Fault = Callable[[], object]


def flags(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    named = {name.replace("_", "-"): str(x) for name, x in values.items()}
    return [word for name, x in named.items() for word in (f"--{prefix}{name}", x)]


def tiny_flags(files: str, output: Path, **changes: Any) -> list[str]:
    """Arguments of `python -m train` for a run of seconds."""
    arguments = ["smoke", *flags(TINY_MODEL, "model."), *flags(TINY_RUN | changes)]
    arguments += flags({"output_dir": output, "optimizer.warmup_steps": 1})
    return [*arguments, "--data.files", files]


def compile_once(cache: str) -> None:
    """Every process of a test compiles the same few programs."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _run(arguments: Sequence[str], output: Path, cache: str, fault: Fault | None) -> None:
    """What a child does: its words in a file, its exit status that of the command."""
    with output.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    compile_once(cache)
    if fault is not None:
        fault()
    sys.exit(main(arguments))


def start(
    arguments: Sequence[str], output: Path, cache: Path, fault: Fault | None = None
) -> BaseProcess:
    """Starts `python -m train`.

    Args:
      arguments: of the command line.
      output: file for what it prints.
      cache: directory of compiled programs.
      fault: called in the process before the command, to prepare what is to go wrong.
    """
    process = PROCESSES.Process(target=_run, args=(arguments, output, str(cache), fault))
    process.start()
    return process


class Pair:
    """Two processes of one run."""

    def __init__(
        self,
        directory: Path,
        files: Sequence[Path],
        cache: Path,
        faults: Sequence[Fault | None] = (None, None),
        **changes: Any,
    ) -> None:
        self.metrics = directory / "run" / "metrics.jsonl"
        self._outputs = [directory / f"{index}.txt" for index in range(2)]
        port, self._processes = free_port(), list[BaseProcess]()
        for index in range(2):
            names = str(files[index] / "*.txt")
            arguments = tiny_flags(names, directory / "run", **ENDLESS | changes)
            values = {"coordinator": f"localhost:{port}", "processes": 2, "index": index}
            arguments[1:1] = flags(values, "distributed.")
            self._processes.append(start(arguments, self._outputs[index], cache, faults[index]))

    def send(self, index: int, number: int) -> None:
        """Waits for some steps and sends a signal to one of the processes."""
        while len(read_metrics(self.metrics)) < 5 and self._processes[index].is_alive():
            time.sleep(0.05)
        pid = self._processes[index].pid
        assert pid is not None
        os.kill(pid, number)

    def ends(self) -> tuple[list[int | None], list[str]]:
        """Exit statuses, and the last lines that were said."""
        statuses = []
        for process in self._processes:
            process.join(SOON + 120 * (not statuses))  # the first may compile
            statuses.append(process.exitcode)
            process.kill()
        texts = [output.read_text() for output in self._outputs]
        assert not any("stack trace" in text or "absl::" in text for text in texts), texts
        return statuses, [text.splitlines()[-1] if text else "" for text in texts]

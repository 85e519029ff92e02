"""`python -m train`: trains a model from a recipe, a configuration file or a run."""

import os
import sys
from collections.abc import Sequence

from mdn_jax.cli.common import run
from train import PROGRAM
from train.checkpointing.run_directory import METRICS_FILE, PLOT_FILE, SAMPLE_FILE
from train.cli.configuration import parse
from train.config import TrainConfig
from train.loop import Result, train
from train.parallel.distributed import leave, only_first_prints, several


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; None means `sys.argv`.

    Returns:
      The exit status: 0, 1 for an error in what the user asked for, 128 + n after signal n.
    """
    config = parse(sys.argv[1:] if arguments is None else arguments)
    # on a GPU; the default leaves a quarter unused; read when jax first asks for devices
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    done = False

    def command() -> int:
        nonlocal done
        status = _train(config)
        done = True
        return status

    status = run(PROGRAM, command)
    return status if done else leave(status)


def _train(config: TrainConfig) -> int:
    with several(config.distributed), only_first_prints():
        result = train(config)
        _report(config, result)
    return 0 if result.signal is None else 128 + result.signal


def _report(config: TrainConfig, result: Result) -> None:
    """Prints where everything is, and the losses last."""
    directory, step = config.directory, int(result.state.step)
    if result.held_out_loss is None:
        print(
            f"stopped by a signal after step {step} of {config.steps}; checkpoint in {directory}; "
            "continue with the same command and --resume"
        )
        return
    files = [METRICS_FILE, PLOT_FILE] + [SAMPLE_FILE] * (config.sample_tokens > 0)
    print(f"after step {step}: checkpoint, {', '.join(files)} in {directory}")
    if result.state.skipped:
        print(
            f"{int(result.state.skipped)} step(s) refused: loss or gradient not finite, or a spike"
        )
    unit, of, loss = result.unit, result.unit.removeprefix("nats/"), result.held_out_loss
    gain = result.unigram_entropy - loss
    if unit != "nats/byte":
        print(
            f"held-out loss {loss / result.bytes_per_token:.3f} nats/byte, at "
            f"{result.bytes_per_token:.2f} bytes a token of the held-out documents"
        )
    print(
        f"held-out loss {loss:.3f} {unit}, unigram entropy of the same {of}s "
        f"{result.unigram_entropy:.3f} (what counting them would give): "
        f"{abs(gain):.3f} {'better' if gain > 0 else 'worse'}"
    )

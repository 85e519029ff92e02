"""`python -m train`: trains a model from a named configuration."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import tyro

from configs import CONFIGS, describe
from mdn_jax import __version__
from mdn_jax.cli.common import run
from mdn_jax.models import AttentionConfig
from train import PROGRAM
from train.checkpointing.run_directory import METRICS_FILE, PLOT_FILE, SAMPLE_FILE
from train.cli import COMMANDS
from train.config import TrainConfig
from train.loop import Result, train
from train.parallel.distributed import leave, only_first_prints, several

# A section whose name alone is a flag.
_SHORT = {
    "--distributed": "--distributed.enabled",
    "--no-distributed": "--distributed.no-enabled",
}
_ATTENTION = '{"layers": [3, 7], "num_heads": 8}'


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


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Reads the name of a configuration and the flags that change its fields.

    Raises:
      SystemExit: an unknown name or flag or a value that does not fit (after a message), or a
        request for help.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog="configurations:\n"
        + "\n".join(f"  {name:20}{describe(name)}" for name in CONFIGS)
        + "\n\ncommands in place of a configuration:\n"
        + "\n".join(f"  {name:20}{what}" for name, what in COMMANDS.items())
        + f"\n\n'{PROGRAM} smoke --help' lists the fields, every one a flag, with their defaults.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} (mdn-jax) {__version__}")
    parser.add_argument(
        "configuration", choices=CONFIGS, metavar="configuration", help="one of those below"
    )
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="--field value", help="fields to change"
    )
    chosen = parser.parse_args(arguments)
    return tyro.cli(
        TrainConfig,
        prog=f"{PROGRAM} {chosen.configuration}",
        description=describe(chosen.configuration),
        default=CONFIGS[chosen.configuration](),
        args=[_SHORT.get(flag, flag) for flag in chosen.flags],
        registry=_registry(),
    )


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Makes softmax attention (`model.attn`) one flag: JSON, as in a published configuration."""
    registry = tyro.constructors.ConstructorRegistry()

    def parse_json(texts: list[str]) -> AttentionConfig | None:
        if texts[0] == "None":
            return None
        try:
            values = json.loads(texts[0])
            return AttentionConfig(**values | {"layers": tuple(values["layers"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"expected None or an object like {_ATTENTION}: {error}") from None

    def to_json(attention: AttentionConfig | None) -> list[str]:
        return [json.dumps(dataclasses.asdict(attention)) if attention else "None"]

    @registry.primitive_rule
    def attention_rule(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[AttentionConfig | None] | None:
        if info.type != AttentionConfig | None:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=parse_json,
            is_instance=lambda value: value is None or isinstance(value, AttentionConfig),
            str_from_instance=to_json,
        )

    return registry


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
    if unit != "nats/byte":
        print(
            f"held-out loss {loss / result.bytes_per_token:.3f} nats/byte, at "
            f"{result.bytes_per_token:.2f} bytes a token of the held-out documents"
        )
    print(
        f"held-out loss {loss:.3f} {unit}, unigram entropy of the same {of}s "
        f"{result.unigram_entropy:.3f}, margin {result.unigram_entropy - loss:+.3f}"
    )

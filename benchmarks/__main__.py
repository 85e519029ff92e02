"""`python -m benchmarks`: the benchmarks as subcommands."""

import sys

from mdn_jax.cli.commands import command

if __name__ == "__main__":
    sys.exit(command("python -m benchmarks", "benchmarks.command", extra="benchmarks"))

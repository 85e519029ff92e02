"""Runs the conformance suite on an implementation of your own.

    python examples/check_your_kernel.py

Put yours in the place of `mine`. It takes the arguments of `mdn_jax.momentum_delta_rule` by keyword
and returns what that returns. What is right comes from a loop over steps in numpy and float64;
besides, the suite cuts, packs, permutes and spoils the arguments. A minute or two on a CPU, most of
it compiling. With pytest, each check a test of its own:

    @pytest.mark.parametrize("check", conformance_checks(mine), ids=str)
    def test_mine(check):
        check()
"""

from typing import Any

import jax

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import Check, conformance_checks


def mine(**inputs: Any) -> tuple[jax.Array, MDNState]:
    """Yours; here the definition as a scan, so that the example runs anywhere."""
    return momentum_delta_rule(**inputs, implementation="scan")


def failed(checks: list[Check]) -> list[str]:
    """Runs the checks, a line each and one for everything that is wrong; the names of those."""
    names = []
    for check in checks:
        problems = check.problems()
        print("ok  " if not problems else "FAIL", check, flush=True)
        for problem in problems:
            print("    ", problem)
        if problems:
            names.append(str(check))
    return names


def main() -> None:
    """Every check; ends with an error if one fails."""
    # lengths around the chunk; dtypes, sizes and limits are further options
    checks = conformance_checks(mine, chunk=16, key_dim=16, value_dim=16)
    names = failed(checks)
    if names:
        raise SystemExit(f"{len(names)} of {len(checks)} checks failed: {', '.join(names)}")


if __name__ == "__main__":
    main()

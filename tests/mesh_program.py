"""Programs with eight simulated devices, for the number is fixed when JAX starts."""

import json
import os
import subprocess
import sys
from typing import Any

DEVICES = 8


def prepare() -> None:
    """What such a program does before it imports JAX."""
    os.environ["XLA_FLAGS"] = (
        f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={DEVICES}"
    )


def report(module: str) -> Any:
    """What `python -m MODULE` prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])

"""`python -m tests.faults`."""

import os
import sys

# compiles much and computes little; read when jax starts its backend, here and in all processes
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
# processes that are killed leave semaphores behind
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"

from tests.faults.campaign import main

if __name__ == "__main__":
    sys.exit(main())

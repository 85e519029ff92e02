"""What the compiler said of each kernel, kept: of the same IR it says the same.

`python -m tests.kernels.compiled` compiles every kernel of `CI` and `STEPS` that the record lacks
(minutes) and drops what no case has any more. A kernel without a record is compiled where it is
asked for.
"""

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

from benchmarks.decoding_inspect import lowered_step
from mdn_jax import MDNConfig
from pallas_kernels import offline_compile
from pallas_kernels.offline_compile import CI, Kernel, KernelReport

STEPS = [
    (MDNConfig(**sizes), dtype, batch)
    for sizes in (
        {"hidden_size": 1024, "head_dim": 128},  # the 400M shape
        {"hidden_size": 2048, "head_dim": 256},  # the 1.3B shape
    )
    for dtype, batch in (("bfloat16", 1), ("bfloat16", 8), ("bfloat16", 64), ("float32", 2))
]
"""Configurations, dtypes and rows of whole steps of decoding."""
RECORD = Path(__file__).parent / "compiled.json"


def report(kernel: Kernel, capability: tuple[int, int]) -> KernelReport:
    """Of the record, or compiled now."""
    kept = _record().get(_digest(kernel, capability))
    return KernelReport(**kept) if kept else offline_compile.compile_kernel(kernel, capability)


def different(kernels: list[Kernel]) -> list[Kernel]:
    """One of each name: launches of one walk differ in their first program and what they alias."""
    return list({kernel.name: kernel for kernel in kernels}.values())


def _digest(kernel: Kernel, capability: tuple[int, int]) -> str:
    """Of all that the compiler sees, and of the compiler."""
    seen = (kernel.source, kernel.warps, kernel.stages, capability, version("triton"))
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


@cache
def _record() -> dict[str, dict]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def main() -> None:
    kept = {
        _digest(kernel, case.capability): report(kernel, case.capability)._asdict()
        for case in CI
        for kernel in different(offline_compile.lower(*case))
    } | {
        _digest(kernel, (9, 0)): report(kernel, (9, 0))._asdict()
        for case in STEPS
        for kernel in lowered_step(*case)
    }
    lines = (f"{json.dumps(digest)}: {json.dumps(kept[digest])}" for digest in sorted(kept))
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(kept)} kernels in {RECORD.name}")


if __name__ == "__main__":
    main()

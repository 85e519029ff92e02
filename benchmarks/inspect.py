"""What the kernels cost on a GPU, on a machine without one: registers, spills, shared memory."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tabulate import tabulate

from pallas_kernels.offline_compile import CI, SHIPPED, Case, KernelReport, reports


@dataclass(frozen=True)
class InspectConfig:
    """Compiles the kernels without a GPU, with the tiles that ship. Needs the extra `triton`."""

    cases: Literal["ci", "shipped"] = "ci"
    """Which shapes: a selection (minutes), or every padded one (up to an hour)."""
    shapes: tuple[tuple[int, int], ...] = ()
    """K V pairs to report instead."""
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float32")
    """Which dtypes of those."""
    capabilities: tuple[Literal["8.0", "9.0"], ...] = ("8.0", "9.0")
    """For which compute capabilities."""
    explicit_p: bool = False
    """With `shapes`: with an erase key of its own."""
    batch: int = 8
    """With `shapes`: rows of six heads; few of them take other tiles."""
    precise: bool = False
    """With `shapes`: as under jax.default_matmul_precision("highest"); bfloat16, 9.0."""
    flagged_only: bool = False
    """Show only the kernels that spill or are over the limit."""
    processes: int | None = None
    """That compile at once; None: one a core."""


def inspect(config: Annotated[InspectConfig, tyro.conf.arg(name="")]) -> None:
    """Registers, spills and shared memory of the kernels; fails if one cannot run."""
    rows: list[list[object]] = []
    over = 0
    for case, kernels in reports(_cases(config), config.processes):
        for kernel in kernels:
            over += kernel.over_limit
            if kernel.spilled or kernel.over_limit or not config.flagged_only:
                rows.append(_row(case, kernel))
    headers = ["K", "V", "dtype", "p", "B", "", "sm", "kernel", "warps", "stages", "registers"]
    headers += ["spilled B", "shared B", "wgmma", "mma", "cp.async", ""]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=[6]))
    if over:
        raise SystemExit(f"{over} kernels need more shared memory than a block may use")


def _cases(config: InspectConfig) -> list[Case]:
    capabilities = [(int(x[0]), int(x[2])) for x in config.capabilities]
    if config.shapes:
        return [
            Case(*shape, dtype, capability, config.explicit_p, config.batch, config.precise)
            for shape in config.shapes
            for dtype in config.dtypes
            for capability in capabilities
        ]
    chosen = CI if config.cases == "ci" else SHIPPED
    return [x for x in chosen if x.dtype in config.dtypes and x.capability in capabilities]


def _row(case: Case, kernel: KernelReport) -> list[object]:
    flags = []
    if kernel.spilled:
        flags.append("spills")
    if kernel.over_limit:
        flags.append(f"OVER the limit of {kernel.shared_limit}")
    return [
        case.key_dim,
        case.value_dim,
        case.dtype,
        "explicit" if case.explicit_p else "alpha k",
        case.batch,
        "precise" if case.precise else "",
        ".".join(map(str, case.capability)),
        *kernel[:6],
        *kernel[7:],
        ", ".join(flags),
    ]

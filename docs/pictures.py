"""Draws the pictures of the documents into docs/pictures: `python docs/pictures.py`.

Bytes come from benchmarks/traffic.py, which a test holds to benchmarks/costs.py; times and floors
from the JSON in benchmarks/results. The same input gives the same files.
"""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle  # noqa: E402

from benchmarks.speed_table import FORWARD_STAGES, read  # noqa: E402
from benchmarks.traffic import traffic  # noqa: E402

OUTPUT = ROOT / "docs" / "pictures"
SHAPE = (8, 4096, 6, 128, 256)
"""B T H K V of the data flow."""
INK, PALE, FORWARD, BACKWARD, STATES = "#222222", "#d9d9d9", "#2f6db3", "#c0562f", "#3a8f5c"
LABELS = {
    "three_gates": "alpha, mu, beta",
    "initial": "initial S, M",
    "rows": "row factors",
    "keys": "k in float16",
    "v_new": "v_new",
    "states": "chunk states S, N",
    "final": "final S, M",
    "d_v_local": "local part of d_v_new",
    "d_final": "d of final S, M",
    "d_states": "d of chunk states",
    "d_initial": "d of initial S, M",
    "column_scales": "scales by column",
    "column_scales_2": "scales by column ",
    "d_keys": "d_q, d_k by the states",
    "d_rows": "d of row factors",
    "d_q_k": "d_q, d_k",
    "d_A_L": "d of A, L",
    "d_gates": "d of gates",
}
"""Arrays of benchmarks/traffic.py as readers know them; the others by their own names."""


def save(figure: Figure, name: str) -> None:
    """Writes one picture, without a date or a version in it."""
    figure.savefig(OUTPUT / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one plain pair of axes in inches."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object
) -> None:
    """From one point to another."""
    options = {"arrowstyle": "-|>", "mutation_scale": 12, "color": INK, "lw": 1.2} | style
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **options))


def data_flow() -> None:
    """Kernels as columns in their order, arrays as lines from who writes them to who reads them."""
    kernels = traffic(*SHAPE)
    names = list(kernels)
    arrays: dict[str, int] = {}
    for kernel in kernels.values():
        arrays |= kernel.reads | kernel.writes
    order = [
        *("q", "k", "v", "gates", "three_gates", "initial", "d_o", "d_final"),
        *(array for kernel in kernels.values() for array in kernel.writes),
    ]
    order = [x for x in order if x in arrays]
    order += [x for x in arrays if x not in order]
    left, top, step, row = 2.75, 1.35, 0.98, 0.27
    width, height = left + step * len(names) + 0.25, top + row * len(order) + 0.75
    figure, axes = blank(width, height)
    x = {name: left + step * (i + 0.5) for i, name in enumerate(names)}
    bottom = 0.55
    for i, name in enumerate(names):
        color = FORWARD if i < FORWARD_STAGES else BACKWARD
        axes.add_patch(
            Rectangle(
                (x[name] - 0.4, bottom), 0.8, height - top - bottom, color=color, alpha=0.1, lw=0
            )
        )
        label = name.replace("_chunk", "_\nchunk").replace("_local", "_\nlocal")
        label = label.replace("recompute_", "recompute_\n")
        axes.text(
            x[name],
            height - top + 0.1,
            label,
            ha="center",
            va="bottom",
            size=8.5,
            color=color,
            weight="bold",
            linespacing=1.05,
        )
        axes.text(
            x[name],
            bottom - 0.06,
            f"{kernels[name].bytes / 1e6:,.0f} MB",
            ha="center",
            va="top",
            size=8.5,
            color=color,
        )
    axes.text(0.12, bottom - 0.06, "moved by each kernel", va="top", size=8.5)
    batch, length, heads, key_dim, value_dim = SHAPE
    axes.text(
        0.12,
        height - 0.14,
        "From kernel to kernel: arrays and their bytes "
        f"(B{batch} T{length} H{heads} K{key_dim} V{value_dim}, bfloat16)",
        va="top",
        size=10.5,
        weight="bold",
    )
    axes.text(
        0.12,
        height - 0.42,
        "a filled dot writes the array, a ring reads it; a line is as thick as the array is large",
        va="top",
        size=8.5,
    )
    for place, array in enumerate(order):
        y = height - top - row * (place + 0.6)
        readers = [n for n in names if array in kernels[n].reads]
        writer = next((n for n in names if array in kernels[n].writes), None)
        from_outside = writer is None
        start = left - 0.05 if from_outside else x[writer]
        end = max([x[n] for n in readers], default=x[writer] + 0.45 if writer else start)
        color = STATES if "states" in array else INK
        lw = 0.6 + 7 * arrays[array] / max(arrays.values())
        axes.plot([start, end], [y, y], color=color, lw=lw, alpha=0.55, solid_capstyle="butt")
        if not readers:
            arrow(axes, (end - 0.12, y), (end + 0.04, y), mutation_scale=9, color=color)
        if writer:
            axes.plot(x[writer], y, "o", color=color, ms=6)
        for reader in readers:
            axes.plot(x[reader], y, "o", mfc="white", mec=color, mew=1.3, ms=6)
        axes.text(left - 0.78, y, LABELS.get(array, array), ha="right", va="center", size=8.5)
        axes.text(
            left - 0.12, y, f"{arrays[array] / 1e6:,.0f} MB", ha="right", va="center", size=8.5
        )
    save(figure, "data_flow")


def chunk_grid() -> None:
    """Work inside the chunks, all at once, beside the scan over the chunks, in order."""
    figure, axes = blank(9.4, 4.5)
    axes.text(0.2, 4.3, "A row of T steps, in chunks of 64", va="top", size=11, weight="bold")
    count, size, gap, first, base = 5, 1.0, 0.42, 2.15, 2.35
    places = [first + i * (size + gap) for i in range(count)]
    for i, left in enumerate(places):
        axes.add_patch(Rectangle((left, base), size, size, fill=False, ec=FORWARD, lw=1.4))
        axes.add_patch(
            Polygon(
                [(left, base), (left + size, base), (left, base + size)], color=FORWARD, alpha=0.25
            )
        )
        name = f"chunk {i + 1}" if i < count - 1 else "chunk NT"
        axes.text(left + size / 2, base + size + 0.08, name, ha="center", va="bottom", size=9)
        axes.text(left + 0.3, base + 0.28, "A, X", ha="center", va="center", size=9, color=FORWARD)
    axes.text(
        0.2,
        base + 0.5,
        "inside a chunk:\nall chunks at once,\n[64, 64] matrices",
        va="center",
        size=9,
        color=FORWARD,
    )
    forward, back = 1.6, 0.75
    for y, color, text, left_to_right in (
        (forward, STATES, "scan over chunks:\nS, N enter each chunk", True),
        (back, BACKWARD, "backward, from the last:\ndS, dN leave each chunk", False),
    ):
        axes.text(0.2, y, text, va="center", size=9, color=color)
        for left in places:
            axes.add_patch(
                Rectangle((left + 0.2, y - 0.2), 0.6, 0.4, color=color, alpha=0.25, lw=0)
            )
            axes.text(
                left + 0.5,
                y,
                "S, N" if left_to_right else "dS, dN",
                ha="center",
                va="center",
                size=9,
                color=color,
            )
        for one, two in pairwise(places):
            ends = (one + 0.83, y), (two + 0.17, y)
            arrow(axes, *(ends if left_to_right else ends[::-1]), color=color, lw=1.6)
    for left in places:
        arrow(axes, (left + 0.5, forward + 0.22), (left + 0.5, base - 0.03), color=STATES, lw=0.9)
    axes.text(
        0.2,
        0.2,
        "at once: intra_chunk_fwd, output_fwd, dv_local_bwd, inter_chunk_bwd, "
        "recompute_gamma, intra_chunk_bwd, gate_bwd.   in order: state_fwd, state_bwd",
        size=8.5,
        va="center",
    )
    save(figure, "chunk_grid")


def roofline() -> None:
    """Floor and measured time of every kernel, a panel a shape."""
    reports = read("stages")
    figure, panels = plt.subplots(1, len(reports), figsize=(9.6, 4.1), sharey=True)
    for axes, report in zip(panels, reports, strict=True):
        stages = report["results"]
        longest = max(stage["median"] for stage in stages.values()) * 1e3
        for i, stage in enumerate(stages.values()):
            color = FORWARD if i < FORWARD_STAGES else BACKWARD
            floor, time = stage["floor"] * 1e3, stage["median"] * 1e3
            axes.barh(i, time, color=color, alpha=0.35, height=0.62)
            axes.barh(i, floor, color=color, height=0.62)
            axes.text(
                time + longest * 0.02, i, f"{time:.3f}, x {time / floor:.1f}", va="center", size=8
            )
        axes.set_yticks(range(len(stages)), list(stages), size=9)
        axes.set_ylim(len(stages) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.32)
        axes.set_xlabel("ms: dark the floor, pale measured", size=9)
        axes.tick_params(axis="x", labelsize=8)
        shape = ",".join(map(str, report["config"]["shape"]))
        axes.set_title(f"B,T,H,K,V = {shape}", size=9.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    note = f"{reports[0]['device']}, {reports[0]['config']['dtype']}, commit {reports[0]['commit']}"
    figure.suptitle(f"Each kernel by itself: {note}", size=10.5, weight="bold")
    figure.tight_layout(rect=(0, 0, 1, 1))
    save(figure, "roofline")


def chunk_halves() -> None:
    """A chunk's matrix: two triangles of 32, and a corner that is two outer products."""
    figure, axes = blank(9.4, 4.3)
    axes.text(
        0.2,
        4.1,
        "Gamma of a chunk of 64 steps: two halves and a corner of rank 2",
        va="top",
        size=11,
        weight="bold",
    )
    left, base, half = 0.9, 0.55, 1.45
    top = base + 2 * half
    for i, name in ((0, "half 1"), (1, "half 2")):
        x, y = left + i * half, top - (i + 1) * half
        axes.add_patch(Polygon([(x, y), (x + half, y), (x, y + half)], color=FORWARD, alpha=0.3))
        axes.text(
            x + half / 3,
            y + half / 3,
            f"{name}\n[32, 32]",
            ha="center",
            va="center",
            size=9,
            color=FORWARD,
        )
    axes.add_patch(Rectangle((left, base), half, half, color=BACKWARD, alpha=0.3, lw=0))
    axes.text(
        left + half / 2,
        base + half / 2,
        "corner",
        ha="center",
        va="center",
        size=9.5,
        color=BACKWARD,
    )
    axes.add_patch(Rectangle((left, base), 2 * half, 2 * half, fill=False, ec=INK))
    axes.text(left + 1.55 * half, base + 1.6 * half, "0", ha="center", va="center", size=11)
    axes.text(left + half, base - 0.12, "written at step j", ha="center", va="top", size=9)
    axes.text(
        left - 0.15, base + half, "seen at step t", ha="right", va="center", size=9, rotation=90
    )
    x, tall = 4.75, base
    axes.text(4.3, base + half / 2, "corner  =", ha="center", va="center", size=10, color=BACKWARD)
    for column, row, start in (("a_t", "Gamma_ej", x), ("b_t", "W_ej", x + 2.25)):
        axes.add_patch(Rectangle((start, tall), 0.2, half, color=BACKWARD, alpha=0.6, lw=0))
        axes.text(start + 0.1, tall - 0.1, column, ha="center", va="top", size=9)
        axes.add_patch(
            Rectangle((start + 0.4, tall + half - 0.2), 1.3, 0.2, color=BACKWARD, alpha=0.6, lw=0)
        )
        axes.text(start + 1.05, tall + half - 0.3, row, ha="center", va="top", size=9)
    axes.text(x + 1.98, tall + half / 2, "+", ha="center", va="center", size=14)
    axes.text(
        x,
        top + 0.05,
        "e: the last step of half 1\n"
        "a_t, b_t: what step t of half 2 sees of S and N at e\n"
        "Gamma_ej, W_ej: what S and N at e hold of the write of step j\n\n"
        "So a chunk costs two [32, 32] products and two outer products,\n"
        "and the gradient of the corner is of rank 2 as well.",
        va="top",
        size=9,
    )
    save(figure, "chunk_halves")


def block_scales() -> None:
    """A chunk of values and of states in blocks of 32 columns, a scale for each block."""
    figure, axes = blank(9.4, 4.6)
    axes.text(
        0.2,
        4.4,
        "float16 with a scale for each block of V: one chunk of one head, V = 128",
        va="top",
        size=11,
        weight="bold",
    )
    left, block, blocks = 1.75, 1.0, 4
    tones = (0.2, 0.4, 0.28, 0.5)

    def tile(y: float, height: float, name: str, size: str, color: str, shift: float = 0.0) -> None:
        for i in range(blocks):
            axes.add_patch(
                Rectangle(
                    (left + i * block + shift, y),
                    block - 0.05,
                    height,
                    color=color,
                    alpha=tones[i],
                    lw=0,
                )
            )
        axes.text(left - 0.2, y + height / 2, f"{name}\n{size}", ha="right", va="center", size=9)

    def scales(y: float, powers: tuple[int, ...], color: str, name: str) -> None:
        for i, power in enumerate(powers):
            center = left + (i + 0.5) * block - 0.025
            axes.add_patch(Rectangle((center - 0.24, y), 0.48, 0.3, fill=False, ec=color, lw=1.2))
            axes.text(center, y + 0.15, f"$2^{{{power}}}$", ha="center", va="center", size=9)
        axes.text(left - 0.2, y + 0.15, name, ha="right", va="center", size=9)

    tile(2.65, 0.95, "v_new", "[64, V]", FORWARD)
    scales(2.2, (-13, -11, -12, -9), FORWARD, "scales [V / 32]")
    tile(1.25, 0.55, "S", "[K, V]", STATES)
    tile(0.65, 0.55, "N", "[K, V]", STATES)
    scales(0.2, (-10, -14, -12, -8), STATES, "scales [V / 32]")
    for i in range(blocks):
        axes.text(
            left + (i + 0.5) * block - 0.025,
            3.66,
            f"{32 * i} to {32 * i + 31}",
            ha="center",
            va="bottom",
            size=8,
        )
    x = left + blocks * block + 0.3
    axes.text(
        x,
        3.55,
        "in memory\n"
        "  v_new   [B, T, HV, V]            float16\n"
        "  scales  [B, HV, NT, V / 32]    float32\n\n"
        "number = scale x float16\n"
        "scale = a power of two, so that every\n"
        "float16 of the block is at most $2^{14}$",
        va="top",
        size=9,
        linespacing=1.35,
    )
    axes.text(
        x,
        1.75,
        "in memory\n"
        "  S, N      [B, HV, NT, K, V]      float16\n"
        "  scales  [B, HV, NT, V / 32]    float32\n\n"
        "S and N of a chunk share the larger\nof their two scales",
        va="top",
        size=9,
        linespacing=1.35,
    )
    save(figure, "block_scales")


def remat() -> None:
    """Memory against speed over the choices of rematerialisation."""
    (report,) = read("remat")
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    memory = [run["peak_gb"] for run in report["runs"]]
    speed = [run["tokens_per_second"] / 1e3 for run in report["runs"]]
    axes.plot(memory, speed, marker="o", color=FORWARD)
    for run, x, y in zip(report["runs"], memory, speed, strict=True):
        axes.annotate(run["remat"], (x, y), (-6, 5), textcoords="offset points", ha="right", size=9)
    axes.set_xlim(0, max(memory) * 1.08)
    axes.set_ylim(0, max(speed) * 1.12)
    axes.set_xlabel("peak memory, GB", size=9)
    axes.set_ylabel("thousand tokens/s", size=9)
    axes.grid(alpha=0.3)
    note = f"{report['device']}, commit {report['commit']}"
    axes.set_title(f"400M, 8 rows of 4,096, by --remat: {note}", size=9.5)
    figure.tight_layout()
    save(figure, "remat")


def main() -> None:
    """Draws all of them."""
    OUTPUT.mkdir(exist_ok=True)
    for draw in (data_flow, chunk_grid, roofline, remat, chunk_halves, block_scales):
        draw()


if __name__ == "__main__":
    main()

"""The loss curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from mdn_jax.new_file import new_file
from train.metrics.log import Record


def plot_losses(
    records: Sequence[Record], *, unigram: float, title: str, path: Path, unit: str = "nats/byte"
) -> None:
    """Draws training and held-out loss against steps.

    Args:
      records: lines of the metrics file.
      unigram: entropy of the held-out text's tokens, drawn as a line.
      title: name of the run.
      path: PNG file to write.
      unit: of all of them.
    """
    # not read before the end of a run: a fifth of what its start imports
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, color, marker in (
        ("loss", "train", "#9ecae1", ""),
        ("held_out_loss", "held-out", "#08519c", "o"),
    ):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=label, color=color, marker=marker, markersize=4)
    axes.axhline(unigram, color="#636363", linestyle="--", label="unigram entropy of held-out")
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(path) as temporary:
        canvas.print_png(temporary)

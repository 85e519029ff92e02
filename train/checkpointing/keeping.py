"""Which checkpoints there are, and which of them are kept."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mdn_jax.saved.model import complete_steps
from mdn_jax.saved.record import DamagedError, read_loss


class StepNames(ocp.step.NameFormat[ocp.step.Metadata]):
    """Names of checkpoints for Orbax, which would count files among those of `complete_steps`."""

    def __init__(self) -> None:
        self._standard = ocp.step.standard_name_format()

    def build_name(self, step: int) -> str:
        """Name of the directory of a step."""
        return str(step)

    def find_all(self, base_path: Any) -> Iterator[ocp.step.Metadata]:
        """All checkpoints in a directory."""
        steps = complete_steps(Path(base_path))
        return (x for x in self._standard.find_all(base_path) if x.step in steps)

    def find_step(self, base_path: Any, step: int) -> ocp.step.Metadata:
        """One of them; raises ValueError where it is not there."""
        return self._standard.find_step(base_path, step)


class Best(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint with the lowest held-out loss of those that have one."""

    def __init__(self, checkpoints: Path) -> None:
        """Reads the losses of the checkpoints that are there.

        Args:
          checkpoints: a run's directory of checkpoints. One that is damaged is named and does not
            count.
        """
        self._losses: dict[int, float | None] = {}
        for step in complete_steps(checkpoints):
            try:
                self._losses[step] = read_loss(checkpoints / str(step))
            except DamagedError as damage:
                print(
                    f"checkpoint of step {step} in {checkpoints} is damaged ({damage}): it does "
                    "not count as the best"
                )

    def add(self, step: int, loss: float | None) -> None:
        """Says the held-out loss of a checkpoint, before it is written."""
        self._losses[step] = loss

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Which of the checkpoints is the best: one or none; the later of equal ones."""
        losses = {x.step: self._losses.get(x.step) for x in checkpoints}
        measured = [(loss, -step) for step, loss in losses.items() if loss is not None]
        best = -min(measured)[1] if measured else None
        return [x.step == best for x in checkpoints]

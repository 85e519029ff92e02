"""Where metrics go beside the run's own file: TensorBoard, Weights & Biases."""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from mdn_jax.errors import RunError
from mdn_jax.extras import install
from mdn_jax.new_file import write_text
from train.config import TrainConfig, to_dict
from train.config_sections import ReportConfig
from train.options import flatten

TENSORBOARD_DIRECTORY, WANDB_ID_FILE = "tensorboard", "wandb_id.txt"


class Writer(Protocol):
    """Takes the metrics of steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes some of a step's metrics, all finite."""

    def close(self) -> None:
        """Writes what is still in memory."""


class TensorBoardWriter:
    """Event files under the run's directory."""

    def __init__(self, config: TrainConfig, *, resume_step: int) -> None:
        """Opens a new file; a viewer drops what older ones have after `resume_step`."""
        module = _import("tensorboardX", "report.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(
            logdir=str(config.directory / TENSORBOARD_DIRECTORY),
            purge_step=resume_step + 1,
            filename_suffix=f".{resume_step}",  # two starts in one second
        )
        texts = "\n".join(f"    {k} = {v}" for k, v in flatten(to_dict(config)).items())
        self._writer.add_text("config", texts, resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases; one that resumes goes on in the same one."""

    def __init__(self, config: TrainConfig, *, resume_step: int) -> None:
        """Starts the run; with the mode "offline" nothing leaves the run's directory."""
        self._wandb = _import("wandb", "report.wandb", "wandb")
        directory = config.directory
        remembered = directory / WANDB_ID_FILE
        identity = remembered.read_text().strip() if resume_step and remembered.exists() else None
        self._run = self._wandb.init(
            project=config.report.wandb_project,
            name=config.name,
            id=identity,
            resume="allow" if identity else None,
            dir=str(directory),
            mode=config.report.wandb,
            config=to_dict(config),
        )
        write_text(remembered, f"{self._run.id}\n")
        # steps of ours, which may go back when a run resumes, not those that it counts itself
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values with their step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Ends the run, waiting until everything is sent or stored."""
        self._run.finish()


def make_writers(config: TrainConfig, *, resume_step: int) -> list[Writer]:
    """The writers that a configuration asks for; the run's directory is there.

    Args:
      config: of the run.
      resume_step: last step of before; 0 for a new run.

    Raises:
      RunError: a package that is not installed.
    """
    report: ReportConfig = config.report
    writers: list[Writer] = []
    if report.tensorboard:
        writers.append(TensorBoardWriter(config, resume_step=resume_step))
    if report.wandb != "off":
        writers.append(WandbWriter(config, resume_step=resume_step))
    return writers


def check_packages(config: TrainConfig) -> None:
    """Raises RunError unless the packages of the writers that are asked for are there."""
    if config.report.tensorboard:
        _import("tensorboardX", "report.tensorboard", "tensorboard")
    if config.report.wandb != "off":
        _import("wandb", "report.wandb", "wandb")


def _import(package: str, field: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RunError(
            f"{field}: expected the package {package}, got {error}: {install(extra)}"
        ) from None

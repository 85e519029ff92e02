"""Checkpoints of a run: written in the background, complete or absent, never overwritten."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from mdn_jax import MDNConfig
from train.config import TrainConfig, resume_conflicts, to_dict
from train.errors import RunError
from train.saved_model import DIRECTORY, read_params
from train.step import TrainState


class Checkpoints:
    """The checkpoints under one output directory; a context manager that waits for the last one.

    Every checkpoint holds the training state, the resolved configuration and the digest of the
    documents. Orbax writes to a temporary directory and renames it, so that an interrupted write
    leaves the checkpoints before it as they were.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Opens the directory; it is made with the first checkpoint.

        Args:
          config: resolved configuration of the run.
        """
        self._config = config
        self._directory = config.directory / DIRECTORY
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep_checkpoints)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the latest complete checkpoint, if there is one."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: TrainState, *, corpus: str) -> None:
        """Starts writing the state under its step, unless that is there already.

        Args:
          state: what to write; its buffers may be reused as soon as this returns.
          corpus: digest of the documents.
        """
        step = int(state.step)
        if step == self.latest:
            return
        run = {"config": to_dict(self._config), "corpus": corpus}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)),
        )

    def wait(self) -> None:
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def restore(self, like: TrainState, *, corpus: str) -> TrainState:
        """The latest checkpoint; there is one.

        Args:
          like: a state of the same structure; only its shapes and types are used.
          corpus: digest of the documents of this run.

        Raises:
          RunError: a checkpoint of another configuration or of other documents.
        """
        step = self._manager.latest_step()
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        if run["corpus"] is None:
            return self._restore_model_only(step, run, like)
        self._check(step, run, corpus)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        state: TrainState = restored.state
        return state

    def _restore_model_only(
        self, step: int, run: Mapping[str, Any], like: TrainState
    ) -> TrainState:
        """The parameters of a checkpoint of `save_model`, and the rest of `like`."""
        saved = MDNConfig.from_dict(run["config"]["model"])
        configs = (dataclasses.replace(c, extras=()) for c in (saved, self._config.model))
        old, new = ({"model": config.to_dict()} for config in configs)
        self._raise_conflicts(step, resume_conflicts(old, new))
        params = read_params(self._directory / str(step), saved)
        params = jax.tree.map(lambda x, y: x.astype(y.dtype), params, like.params)
        return like._replace(params=params)

    def _raise_conflicts(self, step: int, conflicts: list[str]) -> None:
        if conflicts:
            raise RunError(
                f"resume: expected the configuration of the checkpoint of step {step} in "
                f"{self._directory}, got another:\n  " + "\n  ".join(conflicts)
            )

    def _check(self, step: int, run: Mapping[str, Any], corpus: str) -> None:
        where = f"the checkpoint of step {step} in {self._directory}"
        self._raise_conflicts(step, resume_conflicts(run["config"], to_dict(self._config)))
        if run["corpus"] != corpus:
            raise RunError(
                f"data.files: expected the documents of {where} (digest {run['corpus'][:12]}), "
                f"got others ({corpus[:12]})"
            )


def has_checkpoint(directory: Path) -> bool:
    """Whether an output directory holds a complete checkpoint."""
    return any(path.name.isdigit() for path in (directory / DIRECTORY).glob("*"))

"""Checkpoints of a run: written in the background, complete or absent, never overwritten."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mdn_jax import MDNConfig
from train.checksum import checksums
from train.config import TrainConfig, to_dict
from train.distributed import from_all, is_first
from train.errors import RunError
from train.optimizer import Params
from train.resume import resume_conflicts
from train.saved_model import DIRECTORY, complete_steps, read_params
from train.step import TrainState

SET_ASIDE = "set_aside"


class Restored(NamedTuple):
    """What a run continues with.

    Attributes:
      state: the training state.
      data: position in the data (JSON); None: the start, for a converted model.
    """

    state: TrainState
    data: dict[str, Any] | None


class Checkpoints:
    """The checkpoints under one output directory; a context manager that waits for the last one.

    Every checkpoint holds the training state, the position in the data, the resolved configuration
    (and with it the seed, on which every random draw depends), the digest of the documents and the
    sums of the arrays. The latest ones are kept, and the one with the lowest held-out loss. Orbax
    writes to a temporary directory and renames it, so that an interrupted write leaves the
    checkpoints before it as they were. With several processes all of them make the same calls, and
    the directory is one that all of them see.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Opens the directory; it is made with the first checkpoint.

        Args:
          config: resolved configuration of the run.

        Raises:
          RunError: checkpoints there that cannot be listed.
        """
        self._config = config
        self._directory = config.directory / DIRECTORY
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(config.keep_checkpoints),
                checkpoint_managers.BestN(
                    get_metric_fn=_held_out_loss,
                    reverse=True,  # the lowest is the best
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_held_out_loss,  # makes Orbax write the metrics; the policy decides
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except (OSError, ValueError) as error:
            raise RunError(
                f"output_dir: expected checkpoints in {self._directory} that can be listed: {error}"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            with self._writing():
                self._manager.close()
        else:  # says more than what closing may say
            with contextlib.suppress(Exception):
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, if there is one; it may still be on its way."""
        step: int | None = self._manager.latest_step()
        return step

    def save(
        self,
        state: TrainState,
        *,
        data: Mapping[str, Any],
        corpus: str,
        held_out_loss: float | None,
    ) -> None:
        """Starts writing the state under its step, unless that is there already.

        Args:
          state: what to write; its buffers may be reused as soon as this returns.
          data: position in the data, JSON values.
          corpus: digest of the documents.
          held_out_loss: of this state, if it was measured.

        Raises:
          RunError: this or the last checkpoint cannot be written.
        """
        step = int(state.step)
        if step == self.latest:
            return
        run = {"config": to_dict(self._config), "corpus": corpus, "checksums": checksums(state)}
        measured = held_out_loss is not None and math.isfinite(held_out_loss)
        with self._writing():
            self._manager.save(
                step,
                metrics={"held_out_loss": held_out_loss} if measured else None,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    run=ocp.args.JsonSave(run),
                ),
            )

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          RunError: the last checkpoint cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def restore(
        self, like: TrainState, *, corpus: str, begin: Callable[[Params], TrainState]
    ) -> Restored:
        """The checkpoint to continue from: the latest, or that of `resume_step`; there is one.

        Later ones than `resume_step` are moved to the directory `set_aside` of the run.

        Args:
          like: shapes, dtypes and shardings to restore to, whatever they were when it was written.
          corpus: digest of the documents of this run.
          begin: the state before the first step, for a model without an optimizer (`save_model`).

        Raises:
          RunError: no such checkpoint, one of another configuration or of other documents, or a
            damaged one; nothing was changed.
        """
        steps = complete_steps(self._directory)
        step = steps[-1] if self._config.resume_step is None else self._config.resume_step
        if step not in steps:
            raise RunError(
                f"resume_step: expected one of {steps} (checkpoints in {self._directory}), "
                f"got {step}"
            )
        try:
            restored = self._read(step, like, corpus, begin)
        except _DamagedError as damage:
            raise RunError(
                f"resume: expected an intact checkpoint of step {step} in {self._directory}, got "
                f"damaged files ({damage}); {self._way_out(step, like, corpus, begin)}"
            ) from None
        from_all(None)  # nothing is moved before every process has read its part
        self._set_aside([later for later in steps if later > step])
        return restored

    def _way_out(self, step: int, *arguments: Any) -> str:
        for earlier in reversed([s for s in complete_steps(self._directory) if s < step]):
            with contextlib.suppress(_DamagedError):
                self._read(earlier, *arguments)
                return f"that of step {earlier} is intact: continue with --resume-step {earlier}"
        return "no earlier one is intact"

    def _read(
        self,
        step: int,
        like: TrainState,
        corpus: str,
        begin: Callable[[Params], TrainState],
    ) -> Restored:
        """Reads one checkpoint; raises `_DamagedError` or, for another run's, RunError."""
        args = ocp.args
        with _reading():
            run = self._manager.restore(step, args=args.Composite(run=args.JsonRestore())).run
            configuration, documents = run["config"], run["corpus"]
        if documents is None:
            return Restored(self._read_model(step, configuration, like, begin), None)
        self._check(step, configuration, documents, corpus)
        with _reading():
            restored = self._manager.restore(
                step,
                args=args.Composite(state=args.StandardRestore(like), data=args.JsonRestore()),
            )
            sums = checksums(restored.state)
            if sums != run["checksums"]:
                wrong = [name for name in sums if sums[name] != run["checksums"].get(name)]
                raise ValueError(f"wrong sums of {len(wrong)} arrays: {', '.join(wrong[:3])}")
        return Restored(restored.state, restored.data)

    def _read_model(
        self,
        step: int,
        configuration: Mapping[str, Any],
        like: TrainState,
        begin: Callable[[Params], TrainState],
    ) -> TrainState:
        """The parameters of a checkpoint of `save_model`, and the rest as at a beginning."""
        saved = MDNConfig.from_dict(configuration["model"])
        configs = (dataclasses.replace(c, extras=()) for c in (saved, self._config.model))
        old, new = ({"model": config.to_dict()} for config in configs)
        self._raise_conflicts(step, resume_conflicts(old, new))
        return begin(read_params(self._directory / str(step), saved, like=like.params))

    def _raise_conflicts(self, step: int, conflicts: Sequence[str]) -> None:
        if conflicts:
            raise RunError(
                f"resume: expected the configuration of the checkpoint of step {step} in "
                f"{self._directory}, got another:\n  " + "\n  ".join(conflicts)
            )

    def _check(
        self, step: int, configuration: Mapping[str, Any], documents: str, corpus: str
    ) -> None:
        self._raise_conflicts(step, resume_conflicts(configuration, to_dict(self._config)))
        if documents != corpus:
            name = "data.files" if self._config.data.dataset is None else "data.dataset"
            raise RunError(
                f"{name}: expected the documents of the checkpoint of step {step} in "
                f"{self._directory} (digest {documents[:12]}), got others ({corpus[:12]})"
            )

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Moves checkpoints out of the way: a run never writes over one."""
        if not steps:
            return
        if is_first():
            place = self._directory.parent / SET_ASIDE
            place.mkdir(exist_ok=True)
            for step in steps:
                taken = len(list(place.glob(f"{step}.*")))
                (self._directory / str(step)).rename(place / f"{step}.{taken}")
            print(f"checkpoints of steps {list(steps)} moved to {place}")
        ocp.multihost.sync_global_processes("set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what came from the file system by way of several libraries
            raise RunError(
                f"checkpoint: expected to write to {self._directory}, got: {error}; checkpoints "
                f"of steps {complete_steps(self._directory)} are as they were; make room or name "
                "another file system, and continue with --resume"
            ) from error


class _DamagedError(Exception):
    """A checkpoint whose files are not what was written."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damage shows in as many ways as there are libraries below
        # TensorStore adds all of its settings, several times
        message, *_ = str(error).partition(" [tensorstore_spec")
        raise _DamagedError(f"{type(error).__name__}: {message}") from error


def _held_out_loss(metrics: Mapping[str, float]) -> float:
    return metrics["held_out_loss"]


def has_checkpoint(directory: Path) -> bool:
    """Whether an output directory holds a complete checkpoint."""
    return bool(complete_steps(directory / DIRECTORY))

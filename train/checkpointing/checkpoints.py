"""Checkpoints of a run: written in the background, complete or absent, never overwritten."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mdn_jax.errors import RunError
from mdn_jax.saved.digest import digests, file_digest
from mdn_jax.saved.model import DIRECTORY, complete_steps, read_params, saved_at
from mdn_jax.saved.record import (
    POSITION,
    RECORD,
    STATE,
    DamagedError,
    Record,
    make_record,
    read_position,
    read_record,
    reading,
)
from mdn_jax.text.vocabulary import TOKENIZER_FILE
from train.checkpointing.keeping import Best, StepNames
from train.checkpointing.resume import resume_conflicts
from train.checkpointing.run_directory import way_on
from train.config import TrainConfig, to_dict
from train.config_sections import documents_field
from train.optimizer import Params
from train.parallel.distributed import from_all, is_first
from train.stacking import by_layer, groups_of, stacked
from train.step import TrainState

SET_ASIDE = "set_aside"


class Restored(NamedTuple):
    """What a run continues with.

    Attributes:
      state: the training state.
      data: position in the data (JSON); None: the start, for a converted model.
      tokenizer: SHA-256 of the tokenizer's file of the run; None: not known.
    """

    state: TrainState
    data: dict[str, Any] | None
    tokenizer: str | None = None


class Checkpoints:
    """The checkpoints under one output directory; a context manager that waits for the last one.

    Every checkpoint holds the training state, the position in the data and a record: the resolved
    configuration (and with it the seed, on which every random draw depends), the digest of the
    documents and those of all the rest (`mdn_jax.saved.record`). The latest ones are kept, and the
    one with the lowest held-out loss. Orbax writes to a temporary directory and renames it, so that
    an interrupted write leaves the checkpoints before it as they were. The state is written by
    layer, whatever is stacked in the run. With several processes all
    of them make the same calls, and the directory is one that all of them see.
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
        self._best = Best(self._directory)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        latest = checkpoint_managers.LatestN(self._config.keep_checkpoints)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, self._best]),
            step_name_format=StepNames(),
            lightweight_initialize=True,  # reads no checkpoint, and so no damaged one
            cleanup_tmp_directories=True,
            # one that cannot be made ends the save; made behind it, the writers wait for it 300 s
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            return ocp.CheckpointManager(self._directory, options=options)
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
        state = by_layer(state)
        measured = held_out_loss is not None and math.isfinite(held_out_loss)
        record = make_record(
            step,
            config=to_dict(self._config),
            corpus=corpus,
            position=data,
            held_out_loss=held_out_loss if measured else None,
            digests=digests(state),
            tokenizer=file_digest(self._config.directory / TOKENIZER_FILE),
        )
        self._best.add(step, record["held_out_loss"])
        items = {
            STATE: ocp.args.StandardSave(state),
            POSITION: ocp.args.JsonSave(dict(data)),
            RECORD: ocp.args.JsonSave(record),
        }
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

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
        except DamagedError as damage:
            raise RunError(
                f"resume: expected an intact checkpoint of step {step} in {self._directory}, got "
                f"damaged files ({damage}); {self._way_out(step, like, corpus, begin)}"
            ) from None
        from_all(None)  # nothing is moved before every process has read its part
        self._set_aside([later for later in steps if later > step])
        return restored

    def _way_out(self, step: int, *arguments: Any) -> str:
        for earlier in reversed([s for s in complete_steps(self._directory) if s < step]):
            with contextlib.suppress(DamagedError, RunError):
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
        """Reads one checkpoint; raises `DamagedError` or, for another run's, RunError."""
        path = self._directory.absolute() / str(step)
        record = read_record(path)
        if record.corpus is None:
            return Restored(self._read_model(path, record, like, begin), None, record.tokenizer)
        self._check(step, record.config, record.corpus, corpus)
        position = read_position(path, record)
        with reading(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            there = ocp.args.StandardRestore(by_layer(like))
            state = checkpointer.restore(path / STATE, args=there)
            if record.digests is not None:
                record.digests.check(state)
            if int(state.step) != step:
                raise DamagedError(f"{STATE} is of step {int(state.step)}, not {step}")
        shardings = jax.tree.map(lambda x: x.sharding, like)
        state = jax.jit(partial(stacked, groups=groups_of(like)), out_shardings=shardings)(state)
        return Restored(state, position, record.tokenizer)

    def _read_model(
        self,
        path: Path,
        record: Record,
        like: TrainState,
        begin: Callable[[Params], TrainState],
    ) -> TrainState:
        """The parameters of a checkpoint of `save_model`, and the rest as at a beginning."""
        with reading():
            saved = saved_at(path, record)
        configs = (dataclasses.replace(c, extras=()) for c in (saved.model, self._config.model))
        old, new = ({"model": config.to_dict()} for config in configs)
        self._raise_conflicts(saved.step, resume_conflicts(old, new))
        return begin(read_params(saved, like=by_layer(like.params)))

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
            raise RunError(
                f"{documents_field(self._config.data)}: expected the documents of the checkpoint "
                f"of step {step} in {self._directory} (digest {documents[:12]}), got others "
                f"({corpus[:12]})"
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
        self._manager.close()
        self._manager = self._open()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what came from the file system by way of several libraries
            raise RunError(
                f"checkpoint: expected to write to {self._directory}, got: {_brief(error)}; "
                f"{way_on(self._config.directory)}"
            ) from error


def _brief(error: Exception) -> str:
    """The first line of an error, without the settings that TensorStore adds."""
    return str(error).partition(" [tensorstore_spec")[0].partition("\n")[0]


def has_checkpoint(directory: Path) -> bool:
    """Whether an output directory holds a complete checkpoint."""
    return bool(complete_steps(directory / DIRECTORY))

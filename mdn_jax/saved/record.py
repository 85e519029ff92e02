"""What a checkpoint says of itself, in JSON beside its arrays: read with its digest."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mdn_jax.errors import RunError
from mdn_jax.saved.digest import OLD, Digests, json_digest

# items of a checkpoint; each of the JSON ones is a directory with one file
STATE, POSITION, RECORD, METRICS = "state", "data", "run", "metrics"
_MUCH = 300  # characters of another library's message


class DamagedError(Exception):
    """A checkpoint whose files are not what was written; one line."""


class Record(NamedTuple):
    """The record of a checkpoint.

    Attributes:
      config: of the run as nested dictionaries, or of the model alone under `model`.
      corpus: digest of the documents; None for a converted model.
      position: digest of the position in the data; None where there is none, or of before.
      held_out_loss: of its state; None where it was not measured, or of before.
      digests: of its arrays; None for a converted model of before there were any.
      tokenizer: SHA-256 of the tokenizer's file beside the checkpoints; None where there was none,
        or of before.
    """

    config: dict[str, Any]
    corpus: str | None
    position: str | None
    held_out_loss: float | None
    digests: Digests | None
    tokenizer: str | None = None


def make_record(
    step: int,
    *,
    config: Mapping[str, Any],
    digests: Digests,
    corpus: str | None = None,
    position: Mapping[str, Any] | None = None,
    held_out_loss: float | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """The JSON values of a record, under a digest of their own.

    Args:
      step: of the checkpoint.
      config: as of `Record`, and so are the others.
      digests: of its arrays.
      corpus: digest of the documents.
      position: in the data; its digest is recorded.
      held_out_loss: of its state.
      tokenizer: SHA-256 of the tokenizer's file.
    """
    values = {
        "step": step,
        "config": dict(config),
        "corpus": corpus,
        "position": None if position is None else json_digest(position),
        "held_out_loss": held_out_loss,
        "tokenizer": tokenizer,
        "arrays": {"kind": digests.kind, "digests": dict(digests.arrays)},
    }
    return values | {"sha256": json_digest(values)}


def read_record(path: Path) -> Record:
    """The record of the checkpoint in a directory, which its step names.

    Those of before had no digest of their own, and the sums of their arrays or no digests.

    Raises:
      DamagedError: none that can be read, or not the one that was written.
    """
    values = _read_json(path / RECORD / "metadata")
    with reading():
        digest = values.pop("sha256", None)
        if digest is None:
            return _old_record(path, values)
        if json_digest(values) != digest:
            raise DamagedError(f"wrong digest of {RECORD}/metadata")
        if values["step"] != int(path.name):
            raise DamagedError(f"of step {values['step']}, not {path.name}")
        digests = Digests(values["arrays"]["kind"], values["arrays"]["digests"])
        known = {name: values[name] for name in ("config", "corpus", "position", "held_out_loss")}
        return Record(digests=digests, tokenizer=values.get("tokenizer"), **known)


def _old_record(path: Path, values: dict[str, Any]) -> Record:
    sums = values.pop("checksums", None)
    # a change of any name is seen by this
    if values.keys() != {"config", "corpus"} or (sums is None) != (values["corpus"] is None):
        raise DamagedError(f"{RECORD}/metadata is no record of a checkpoint")
    if not isinstance(values["config"], dict) or not isinstance(values["corpus"], str | None):
        raise DamagedError(f"{RECORD}/metadata is no record of a checkpoint")
    digests = None if sums is None else Digests(OLD, dict(sums))
    return Record(values["config"], values["corpus"], None, None, digests)


def read_loss(path: Path) -> float | None:
    """The held-out loss of the checkpoint in a directory, if it was measured.

    Raises:
      DamagedError: a record that cannot be read.
    """
    loss = read_record(path).held_out_loss
    if loss is None and (path / METRICS).exists():  # as those of before
        loss = _read_json(path / METRICS / "metrics").get("held_out_loss")
    if loss is not None and not isinstance(loss, float):
        raise DamagedError(f"held-out loss {loss!r}")
    return loss


def read_position(path: Path, record: Record) -> dict[str, Any]:
    """The position in the data of the checkpoint in a directory.

    Raises:
      DamagedError: none that can be read, or not that of the record and of the step.
    """
    position = _read_json(path / POSITION / "metadata")
    if record.position is not None and json_digest(position) != record.position:
        raise DamagedError(f"wrong digest of {POSITION}/metadata")
    if position.get("step") != int(path.name):
        raise DamagedError(f"{POSITION}/metadata is of another step than {path.name}")
    return position


def _read_json(file: Path) -> dict[str, Any]:
    name = "/".join(file.parts[-2:])
    if not file.is_file():  # nor something that never ends
        raise DamagedError(f"{name} is missing")
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise DamagedError(f"{name} is no JSON object")
    return values


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Raises DamagedError for any error: damage shows in as many ways as there are libraries."""
    _silence_stragglers()
    try:
        yield
    except (DamagedError, RunError):
        raise
    except Exception as error:
        cause = error.__cause__ or error  # Orbax says less than the library below it
        # TensorStore adds all of its settings, several times
        message, *_ = str(cause).partition(" [tensorstore_spec")
        line = " ".join(message.split())
        line = line if len(line) <= _MUCH else f"{line[:_MUCH]} …"
        raise DamagedError(f"{type(cause).__name__}: {line}") from error


def _silence_stragglers() -> None:
    """Keeps to itself what is not raised anywhere.

    Orbax raises at the first array that cannot be read and leaves the reads of all others behind,
    which fail alone, each with a traceback, when their event loop has ended.
    """
    if not isinstance(sys.unraisablehook, _Stragglers):
        sys.unraisablehook = _Stragglers(sys.unraisablehook)
    log = logging.getLogger("asyncio")
    if _is_other not in log.filters:
        log.addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not _is_straggler(record.exc_info[1])


class _Stragglers:
    """Hook for errors that Python can only show: all but these go to the hook before it."""

    def __init__(self, before: Callable[[Any], object]) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if not _is_straggler(unraisable.exc_value):
            self._before(unraisable)


def _is_straggler(error: BaseException | None) -> bool:
    return any(words in str(error) for words in ("Event loop is closed", "OCDBT", "TensorStore"))

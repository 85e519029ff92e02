"""What a long command leaves on disk so that the same command need not do it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Records:
    """Results, a line of JSON each, which a command adds and finds again when it goes on.

    Files of several outputs may be joined with `cat`. A line cut short is removed.
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there; the directory is made.

        Args:
          path: the file, there or not.

        Raises:
          SystemExit: a file of something else.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        *lines, rest = path.read_text().split("\n") if path.exists() else [""]
        self._records: list[dict[str, Any]] = [_parsed(path, line) for line in lines]
        if rest and not rest.startswith("{"):
            raise _not_ours(path, rest)
        self._file = path.open("a")
        if rest:
            self._file.truncate(self._file.tell() - len(rest.encode()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def find(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The records with all of these values, in their order."""
        wanted = json.loads(json.dumps(dict(values), default=str))
        return [r for r in self._records if all(r.get(name) == x for name, x in wanted.items())]

    def add(self, values: Mapping[str, Any]) -> None:
        """Writes one record; what JSON does not know becomes text."""
        line = json.dumps(dict(values), default=str)
        self._records.append(json.loads(line))
        self._file.write(line + "\n")
        self._file.flush()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file that is only read.

    Raises:
      SystemExit: a file of something else.
    """
    return [_parsed(path, line) for line in path.read_text().splitlines()]


def _parsed(path: Path, line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        raise _not_ours(path, line) from None


def _not_ours(path: Path, line: str) -> SystemExit:
    return SystemExit(f"{path}: expected lines of JSON, got {line[:40]!r}")

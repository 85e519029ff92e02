"""Results of a long command, a line of JSON each: what is there is not measured again."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Records:
    """Lines of a file that a command adds to and that the same command finds when it goes on.

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
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        self._records: list[dict[str, Any]] = [_parsed(path, line) for line in whole]
        if len(whole) < len(lines):
            path.write_text("".join(whole))
        self._file = path.open("a")

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


def _parsed(path: Path, line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        raise SystemExit(f"{path}: expected lines of JSON, got {line[:40]!r}") from None

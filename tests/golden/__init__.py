"""Golden vectors: a selection that fits the repository, or the whole set."""

import os
from pathlib import Path

HERE = Path(__file__).parent


def golden_files(pattern: str) -> list[Path]:
    """Files of the golden set; `MDN_GOLDEN` names a folder with the cases too large for here."""
    folders = [HERE, *map(Path, filter(None, [os.environ.get("MDN_GOLDEN")]))]
    found = {path.name: path for folder in reversed(folders) for path in folder.glob(pattern)}
    return [found[name] for name in sorted(found)]

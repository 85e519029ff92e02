"""The commands that stand on the pages of the site, in their order."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# what stands for a name of the reader's
STANDS_FOR = {"HOST:1234": "localhost:1234", "I": "0", "HASH": "0123456"}

_PROGRAM = (
    r"\.venv/bin/\S+|python|pip|pytest|make|mdn-[a-z]+|deploy/\S+|docker|kubectl|sbatch|git|source"
    r"|echo|mkdir|for|cd|cp|curl|sh|bash|cat|export"
)
_COMMAND = re.compile(rf"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(?:{_PROGRAM})(?: |$)")
_NAME = re.compile(r"python -m (train( tokenize| plot)?|benchmarks)|mdn-[a-z]+|make|pip|git")
_FENCE = re.compile(r"```(\w*)")
_SHELLS = ("bash", "sh", "shell", "console")


class Command(NamedTuple):
    """A command of a page.

    Attributes:
      page: the file.
      line: its number there.
      text: as it is written, over lines that end with a backslash.
      shown: it is one cell of a table: an example of what may be written, in no order.
    """

    page: Path
    line: int
    text: str
    shown: bool

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """Without variables before it, the path of the environment, and the comment behind it."""
        words = shlex.split(self.text, comments=True)
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        words[0] = words[0].removeprefix(".venv/bin/")
        return [STANDS_FOR.get(word, word) for word in words]


def commands(page: Path) -> Iterator[Command]:
    """Commands in indented and shell blocks, and those that are a whole cell of a table."""
    language, begun = None, None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if begun is not None:
            begun = begun._replace(text=f"{begun.text[:-1].rstrip()} {line.strip()}")
        elif fence := _FENCE.match(line):
            language = None if language is not None else fence[1]
        elif line.startswith("|"):
            for cell in re.findall(r"(?<=\|) `([^`|]+)` (?=\|)", line):
                if _COMMAND.match(cell) and not _NAME.fullmatch(cell):
                    yield Command(page, number, cell, shown=True)
        elif language in _SHELLS or (language is None and line.startswith("    ")):
            text = line.strip().removeprefix("$ ")
            if _COMMAND.match(text) or (language is not None and text):
                begun = Command(page, number, text, shown=False)
        if begun is not None and not begun.text.endswith("\\"):
            yield begun
            begun = None

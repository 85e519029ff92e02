"""Files of packages to clean text: HTML, man pages, info, and what is text already."""

import gzip
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

SHORTEST = 256
"""Characters of a document at least."""
LONGEST = 1_000_000
"""Characters of a document at most; a longer text is cut between two paragraphs."""
_LONGEST_LINE = 5_000
_REPEATED, _RANDOM = 0.1, 0.7  # compressed to less: a generated table; to more: data in letters
_SURE = 4096  # characters of which that can be said

# what is on every page of a manual: ways to other pages, forms, programs
_NOT_TEXT = (
    "//script | //style | //nav | //header | //footer | //form | //*[@role='navigation'] | "
    "//*[contains(@class, 'navheader') or contains(@class, 'navfooter') or "
    "contains(@class, 'sphinxsidebar') or contains(@class, 'headerlink') or "
    "contains(@class, 'sidebar') or contains(@class, 'breadcrumb') or contains(@class, 'toc') or "
    "contains(concat(' ', @class, ' '), ' related ') or "
    "contains(concat(' ', @class, ' '), ' nav ') or @id = 'navigation']"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")
_BLANKS = re.compile(r"\n{3,}")
_INFO_NODE = re.compile(r"\x1f\nFile: .*\n")
_INFO_TABLE = re.compile(r"\x1f\n(Indirect|Tag Table|Local Variables):.*", re.DOTALL)
_PACKED = (".gz", ".dz")  # dictzip can be read as gzip


def suffix_of(path: str) -> str:
    """The suffix that says what a file is, without that of its compression; of a dictionary .dict.

    A name without a dot has "".
    """
    name = PurePosixPath(path).name
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return PurePosixPath(name).suffix.lower()


def text_of(path: str, data: bytes) -> str:
    """The text of a file, cleaned; "" where there is none.

    Args:
      path: in its package.
      data: contents, compressed if the path says so.

    Raises:
      ValueError: not what its name says, or no text.
    """
    if path.endswith(_PACKED):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"not gzip: {error}") from None
    readers: dict[str, Callable[[bytes], str]] = {
        ".html": _from_html,
        ".info": lambda data: _from_info(_decoded(data)),
    }
    read = _from_man if "/man/man" in path else readers.get(suffix_of(path), _decoded)
    return _clean(read(data))


def _decoded(data: bytes) -> str:
    if b"\x00" in data:
        raise ValueError("a zero byte")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")  # of older sources and pages


def _from_html(data: bytes) -> str:
    from inscriptis import Inscriptis
    from inscriptis.css_profiles import CSS_PROFILES
    from inscriptis.model.config import ParserConfig
    from lxml import etree, html

    try:
        # bytes: a page may say what its encoding is, and old ones do
        tree = html.document_fromstring(data if b"charset" in data[:2048] else _decoded(data))
    except (etree.LxmlError, ValueError) as error:
        raise ValueError(f"no HTML: {error}") from None
    for part in tree.xpath(_NOT_TEXT):
        if part.getparent() is not None:
            part.drop_tree()
    text: str = Inscriptis(tree, ParserConfig(css=CSS_PROFILES["strict"])).get_text()
    return text


def _from_man(data: bytes) -> str:
    done = subprocess.run(
        ["groff", "-mandoc", "-Kutf8", "-Tutf8", "-P-cbou", "-rLL=78n"],
        input=data,
        capture_output=True,
        check=False,
    )
    if done.returncode or re.match(rb"\.so ", data):  # a name of another page
        raise ValueError("no man page")
    return done.stdout.decode()


def can_read_man() -> bool:
    """Whether man pages can be formatted here."""
    return shutil.which("groff") is not None


def _from_info(text: str) -> str:
    return _INFO_NODE.sub("", _INFO_TABLE.sub("", text))


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\xa0", " ")
    text = _CONTROL.sub("", text).encode(errors="replace").decode()  # no halves of surrogate pairs
    lines = (line.rstrip() for line in text.split("\n"))
    text = _BLANKS.sub("\n\n", "\n".join(lines)).strip("\n")
    return f"{text}\n" if text.strip() else ""


def pieces_of(text: str) -> Iterator[str]:
    """A text as documents of at most `LONGEST` characters, about, cut between paragraphs."""
    while len(text) > LONGEST:
        cut = text.rfind("\n\n", 0, LONGEST) + 1 or text.rfind("\n", 0, LONGEST) + 1 or LONGEST
        yield text[:cut]
        text = text[cut:].lstrip("\n")
    yield text


def is_worth_reading(text: str) -> bool:
    """Whether a document is long enough, and neither a generated table nor data in letters."""
    if len(text) < SHORTEST or max(map(len, text.split("\n"))) > _LONGEST_LINE:
        return False
    data = text.encode(errors="surrogatepass")
    if len(text) < _SURE:
        return True
    return _REPEATED <= len(zlib.compress(data, 1)) / len(data) <= _RANDOM

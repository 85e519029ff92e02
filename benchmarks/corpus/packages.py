"""Packages of a Debian system: found and fetched with apt, read without installing them."""

import gzip
import hashlib
import importlib.util
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from mdn_jax.extras import install

_TOOLS = ("apt-cache", "apt-get", "dpkg-deb")
_LICENCE = re.compile(r"^License:[ \t]*(\S.*)$", re.MULTILINE)
_MOST_LICENCES = 6
_LONGEST_NAME = 60


class Package(NamedTuple):
    """A package that the machine's lists of packages have.

    Attributes:
      name: of the package.
      version: of the candidate.
      sha256: of its file.
      size: of its file, bytes.
    """

    name: str
    version: str
    sha256: str
    size: int


class Unavailable(Exception):  # noqa: N818 (a package that is not there is no mistake)
    """A package that cannot be had; the message says why."""


def check_tools() -> None:
    """Raises unless this is a Debian system with the libraries of the extra `corpus`.

    Raises:
      SystemExit: a tool or a library that is missing.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"corpus: expected a Debian system with {', '.join(_TOOLS)}, got one without "
            f"{', '.join(missing)}"
        )
    for library in ("inscriptis", "tokenizers"):
        if importlib.util.find_spec(library) is None:
            raise SystemExit(
                f"corpus: expected the package {library}, got none: {install('corpus')}"
            )


def find(name: str) -> Package:
    """A package in the machine's lists; asks nobody else.

    Raises:
      Unavailable: not in the lists.
    """
    out = _run(["apt-cache", "show", "--no-all-versions", name], None).stdout
    fields = dict(line.split(": ", 1) for line in out.splitlines() if re.match(r"\w+: ", line))
    if "SHA256" not in fields:
        raise Unavailable("not in apt's lists of packages (apt-get update fetches new lists)")
    return Package(name, fields["Version"], fields["SHA256"], int(fields["Size"]))


def fetch(package: Package, directory: Path) -> Path:
    """The file of a package, downloaded unless it is in the directory.

    Args:
      package: from `find`.
      directory: of package files.

    Raises:
      Unavailable: apt cannot fetch it, or what it fetched is damaged.
    """
    path = directory / f"{package.name}_{package.version.replace(':', '%3a')}.deb"
    if path.exists() and file_sha256(path) == package.sha256:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        done = _run(["apt-get", "download", f"{package.name}={package.version}"], Path(temporary))
        files = list(Path(temporary).glob("*.deb"))
        if done.returncode or len(files) != 1:
            errors = [x for x in done.stderr.splitlines() if x.startswith("E:")] or ["no file"]
            raise Unavailable(f"apt-get download: {errors[0].removeprefix('E:').strip()}")
        if (digest := file_sha256(files[0])) != package.sha256:
            raise Unavailable(f"expected SHA-256 {package.sha256[:12]}, got {digest[:12]}")
        files[0].replace(path)
    return path


def _run(command: list[str], directory: Path | None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def file_sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Regular files of a package, and of the archives in it, by their paths.

    Args:
      path: of the package's file.
      wanted: which paths to read; those within an archive begin with the path of it. Archives are
        read if they are in usr/src or end in src.zip.

    Raises:
      Unavailable: a damaged package.
    """
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield from _members(process.stdout, "", wanted)
        except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
            raise Unavailable(f"damaged: {type(error).__name__}: {error}") from None
        finally:
            process.stdout.close()
            process.kill()


def _members(
    stream: IO[bytes], prefix: str, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            path = prefix + member.name.removeprefix("./")
            if not member.isreg():
                continue
            if not prefix and re.fullmatch(r"usr/src/.*\.tar\.(xz|gz|bz2)", path):
                inner = archive.extractfile(member)
                assert inner is not None
                yield from _members(inner, f"{path}/", wanted)
            elif not prefix and path.endswith("/src.zip"):
                inner = archive.extractfile(member)
                assert inner is not None
                with zipfile.ZipFile(io.BytesIO(inner.read())) as files:
                    for name in sorted(files.namelist()):
                        if wanted(f"{path}/{name}"):
                            yield f"{path}/{name}", files.read(name)
            elif wanted(path):
                inner = archive.extractfile(member)
                assert inner is not None
                yield path, inner.read()


def licence_path(name: str) -> str:
    """Where a package says who may do what with it."""
    return f"usr/share/doc/{name}/copyright"


def licences(copyright_file: bytes | None) -> str:
    """The licences that a package's `debian/copyright` names, those of most files first.

    Args:
      copyright_file: its contents; None: the package has none of its own.
    """
    if copyright_file is None:
        return "in the copyright file of another package of the same source"
    if copyright_file[:2] == b"\x1f\x8b":
        copyright_file = gzip.decompress(copyright_file)
    lines = _LICENCE.findall(copyright_file.decode(errors="replace"))
    found = [" ".join(x.split()) for x in lines if len(x) <= _LONGEST_NAME]  # others are sentences
    if not found:
        return "in words, see its debian/copyright"
    names = sorted(set(found), key=lambda name: (-found.count(name), name))
    more = f" and {len(names) - _MOST_LICENCES} more" if len(names) > _MOST_LICENCES else ""
    return "; ".join(names[:_MOST_LICENCES]) + more

"""Which packages a corpus is made of: a list in TOML, by domain."""

import tomllib
from pathlib import Path
from typing import NamedTuple

RECIPE = Path(__file__).with_name("recipe.toml")


class Domain(NamedTuple):
    """Packages with text of one kind.

    Attributes:
      name: in the manifest and of the held-out sets.
      most_mb: MB (1e6 bytes) of text that are kept at most.
      suffixes: of the files that are read.
      packages: by name, the parts of which a file's path must have one; none: every path.
      without: parts that no file's path may have.
    """

    name: str
    most_mb: float
    suffixes: frozenset[str]
    packages: dict[str, tuple[str, ...]]
    without: tuple[str, ...]


def _strings(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):  # an unquoted name with a dot makes a table
        raise TypeError(f"expected a list of parts of paths, got {values!r}")
    return tuple(map(str, values))


def read_recipe(path: Path = RECIPE) -> list[Domain]:
    """The domains of a recipe, in their order.

    Raises:
      SystemExit: no such file, or one of something else.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        domains = [
            Domain(
                name,
                float(domain["most_mb"]),
                frozenset(map(str, domain["suffixes"])),
                {package: _strings(parts) for package, parts in domain["packages"].items()},
                _strings(domain.get("without", [])),
            )
            for name, domain in values.items()
        ]
    except OSError as error:
        raise SystemExit(f"recipe: expected a file, got {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(
            "recipe: expected domains with most_mb, suffixes and packages, got "
            f"{path}: {type(error).__name__}: {error}"
        ) from None
    if not domains:
        raise SystemExit(f"recipe: expected at least one domain, got none in {path}")
    names = [package for domain in domains for package in domain.packages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SystemExit(f"recipe: expected every package once, got {', '.join(twice)} twice")
    return domains

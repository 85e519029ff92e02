"""How somebody gets the packages that only a part of the library needs."""


def install(extra: str) -> str:
    """What to do about packages that are missing, for the end of a message.

    Args:
      extra: of pyproject.toml.
    """
    return (
        f"install mdn-jax with the extra '{extra}' (in a clone of it: pip install -e '.[{extra}]')"
    )

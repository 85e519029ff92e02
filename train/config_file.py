"""Configurations as files: TOML, YAML or JSON in, and out again."""

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mdn_jax.errors import RunError
from mdn_jax.extras import install
from mdn_jax.new_file import write_text
from train.config import TrainConfig, from_dict, to_dict
from train.options import flatten

RECIPE = "recipe"
"""The key of a file that names the recipe which the file changes."""

_NONE = "None"  # TOML has no null
_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_FLAGS_ALONE = ("resume", "resume_step")  # a run's own file has those of its last start


def _from_json(text: str) -> Any:
    return json.loads(text)


def _from_toml(text: str) -> Any:
    return _with_none(tomllib.loads(text))


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(x) for key, x in value.items()}
    return None if value == _NONE else value


def _from_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise RunError(f"YAML needs the package PyYAML: {install('train')}") from None

    class Loader(yaml.SafeLoader):
        """YAML 1.2's floats: 3e-4 is one without a point."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


READERS: dict[str, Callable[[str], Any]] = {
    ".toml": _from_toml,
    ".yaml": _from_yaml,
    ".yml": _from_yaml,
    ".json": _from_json,
}
"""What reads a file, by its suffix."""


def is_config_file(name: str) -> bool:
    """Whether a name is that of a configuration file."""
    return Path(name).suffix.lower() in READERS


def read_config_file(
    name: str,
    recipes: Mapping[str, Callable[[], TrainConfig]],
    *,
    base: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The configuration that a file describes.

    The fields that the file does not state are those of the recipe that it names (`recipe`), or
    the defaults. `model.vocab_size` follows the tokenizer unless the file states it.

    Args:
      name: of the file; its suffix says what it is.
      recipes: by their names.
      base: configuration (`to_dict`) that the file changes in place of its recipe.

    Raises:
      RunError: a file that cannot be read, an unknown field, or a value that does not fit: the
        file, the field, what was expected and what came.
    """
    path = Path(os.path.expanduser(name))
    try:
        values = READERS[path.suffix.lower()](path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected fields with values, got {values!r:.40}")
        return _build(values, recipes, base)
    except OSError as error:
        raise RunError(
            f"configuration: expected a file that can be read, got {name}: {error.strerror}"
        ) from None
    except RecursionError:
        raise RunError(f"{name}: expected a configuration, got lists in lists in lists") from None
    except (ValueError, RunError) as error:
        raise RunError(f"{name}: {error}") from None


def _build(
    values: dict[str, Any],
    recipes: Mapping[str, Callable[[], TrainConfig]],
    base: Mapping[str, Any] | None,
) -> TrainConfig:
    recipe = values.pop(RECIPE, None)
    if recipe is not None and (not isinstance(recipe, str) or recipe not in recipes):
        raise ValueError(f"{RECIPE}: expected one of {', '.join(recipes)}, got {recipe!r:.40}")
    stated = {name: value for name, value in values.items() if name not in _FLAGS_ALONE}
    if base is not None:
        return from_dict(_merged(base, stated))
    model = stated.get("model", {})
    given = isinstance(model, dict) and "vocab_size" in model
    base = {} if recipe is None else to_dict(recipes[recipe]())
    return from_dict(_merged(base, {"fit_vocab_size": not given} | stated))


def _merged(base: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Values with those stated in place of others; sections field by field."""
    merged = dict(base)
    for name, value in stated.items():
        below = base.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping) and name != "attn"
        merged[name] = _merged(below, value) if both and below is not None else value
    return merged


def as_toml(config: TrainConfig) -> str:
    """Every field as a line of TOML, under the name of its flag; "None" where there is no value."""
    values = flatten(to_dict(config))
    lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(_NONE if value is None else value, ensure_ascii=False).replace(
        "\x7f", "\\u007F"
    )


def write_config_file(name: str, config: TrainConfig) -> None:
    """Writes a configuration in the format of the file's suffix.

    Raises:
      RunError: another suffix, or a file that cannot be written.
    """
    path = Path(os.path.expanduser(name))
    suffix = path.suffix.lower()
    if suffix == ".toml":
        text = as_toml(config)
    elif suffix == ".json":
        text = json.dumps(to_dict(config), indent=2) + "\n"
    elif suffix in READERS:
        try:
            import yaml
        except ImportError:
            raise RunError(
                f"save_config: YAML needs the package PyYAML: {install('train')}"
            ) from None
        text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    else:
        raise RunError(f"save_config: expected a file named {', '.join(READERS)}, got {name}")
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(
            f"save_config: expected a file that can be written, got {name}: {error.strerror}"
        ) from None

"""Fields that are one flag although they have fields of their own: JSON, or shorter."""

import dataclasses
import json
from typing import Any

import tyro

from mdn_jax.models import AttentionConfig
from train.config_sections import SourceConfig
from train.options import build

_ATTENTION = '{"layers": [3, 7], "num_heads": 8}'
_SOURCE = '{"files": ["books/*.jsonl"], "weight": 3, "name": "books"}'


def json_flags() -> tyro.constructors.ConstructorRegistry:
    """How tyro reads `model.attn` and `data.sources`."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def attention(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[AttentionConfig | None] | None:
        if info.type != AttentionConfig | None:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda texts: _attention(texts[0]),
            is_instance=lambda value: value is None or isinstance(value, AttentionConfig),
            str_from_instance=lambda value: [
                json.dumps(dataclasses.asdict(value)) if value else "None"
            ],
        )

    @registry.primitive_rule
    def sources(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[tuple[SourceConfig, ...]] | None:
        if info.type != tuple[SourceConfig, ...]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="PATHS=WEIGHT|JSON ...",
            instance_from_str=lambda texts: tuple(map(_source, texts)),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [_source_text(source) for source in value],
        )

    return registry


def _attention(text: str) -> AttentionConfig | None:
    if text == "None":
        return None
    try:
        values = json.loads(text)
        return AttentionConfig(**values | {"layers": tuple(values["layers"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"expected None or an object like {_ATTENTION}: {error}") from None


def _source(text: str) -> SourceConfig:
    if text.startswith("{"):
        return build(SourceConfig, json.loads(text), "data.sources.")
    paths, equals, weight = text.rpartition("=")
    try:
        return SourceConfig(files=(paths,), weight=float(weight if equals and paths else "none"))
    except ValueError as error:
        if "expected" in str(error):
            raise
        raise ValueError(f"expected PATHS=WEIGHT or an object like {_SOURCE}, got {text}") from None


def _source_text(source: SourceConfig) -> str:
    values: dict[str, Any] = dataclasses.asdict(source)
    return json.dumps({name: value for name, value in values.items() if value is not None})

"""A server in a thread of the tests' process, and what asks it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.serving.app import Service
from mdn_jax.serving.device import Device
from mdn_jax.serving.engine import Engine
from mdn_jax.serving.limits import Limits
from mdn_jax.serving.prefixes import PrefixCache
from mdn_jax.serving.server import in_background
from mdn_jax.serving.texts import Texts
from mdn_jax.text.chat import ChatTemplate
from mdn_jax.text.text import ByteText
from tests.tiny import TINY_MODEL

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_model() -> MDNForCausalLM:
    """A model of bytes with clear choices."""
    config = MDNConfig(**TINY_MODEL | {"initializer_range": 0.5})
    return MDNForCausalLM(config, implementation="xla", rngs=nnx.Rngs(0))


class Running:
    """A server that runs.

    Attributes:
      engine: that makes its texts.
      port: of it.
      url: of it.
    """

    def __init__(self, engine: Engine, port: int) -> None:
        self.engine, self.port, self.url = engine, port, f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> openai.OpenAI:
        """A client of OpenAI's package."""
        options = {"api_key": "none", "max_retries": 0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def idle(self) -> None:
        """Waits until no slot is taken."""
        while self.engine.active or self.engine.waiting:
            time.sleep(0.005)


def make_engine(
    model: MDNForCausalLM,
    limits: Limits,
    *,
    piece: int = 32,
    block: int = 8,
    together: int = 4,
    prefix_bytes: int = 1 << 20,
    **options: Any,
) -> Engine:
    """An engine that has not begun."""
    device = Device(
        model,
        slots=limits.slots,
        piece=piece,
        block=block,
        max_length=64,
        end_tokens=0,
        top=5,
        together=together,
    )
    return Engine(device, limits, PrefixCache(prefix_bytes), **options)


@contextmanager
def server(
    model: MDNForCausalLM, limits: Limits | None = None, *, engine: Any = None, **options: Any
) -> Iterator[Running]:
    """A server of bytes with a chat template."""
    limits = limits or Limits(slots=4)
    made = make_engine(model, limits, **(engine or {}))
    texts = Texts(ByteText(), ChatTemplate(TEMPLATE))
    service = Service(made, texts, name=NAME, limits=limits, **options)
    with in_background(service.app(), made) as port:
        yield Running(made, port)
    assert made.status == "ended"

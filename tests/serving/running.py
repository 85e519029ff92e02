"""A server in a thread of the tests' process, and what asks it."""

import threading
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
from mdn_jax.serving.server import Server, listen
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
      url: of it.
      engine: that makes its texts.
    """

    def __init__(self, engine: Engine, service: Service, limits: Limits) -> None:
        self.engine = engine
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = Server(service.app(), engine, drain_seconds=limits.drain_seconds)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def __enter__(self) -> "Running":
        self.engine.start()
        self._thread.start()
        while not (self._server.started and self.engine.status != "starting"):
            time.sleep(0.01)
        assert self.engine.status == "ready"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.engine.close()
        self._socket.close()
        assert self.engine.status == "ended"

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
    prefix_bytes: int = 1 << 20,
    **options: Any,
) -> Engine:
    """An engine that has not begun."""
    device = Device(
        model, slots=limits.slots, piece=piece, block=block, max_length=64, end_tokens=0, top=5
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
    with Running(
        made, Service(made, texts, name=NAME, limits=limits, **options), limits
    ) as running:
        yield running

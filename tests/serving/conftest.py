from collections.abc import Iterator

import openai
import pytest

from mdn_jax import MDNForCausalLM
from tests.serving.running import Running, server, tiny_model


@pytest.fixture(scope="session")
def model() -> MDNForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def running(model: MDNForCausalLM) -> Iterator[Running]:
    with server(model) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as client:
        yield client

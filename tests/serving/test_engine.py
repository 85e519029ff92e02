"""The engine by itself: what it does when the device fails, and which blocks it asks for."""

import threading
import time

import pytest

from mdn_jax import Sampling
from mdn_jax.serving.app import Service
from mdn_jax.serving.engine import NotReadyError
from mdn_jax.serving.jobs import Job
from mdn_jax.serving.limits import Limits
from mdn_jax.serving.server import Server, listen, run_server
from mdn_jax.serving.texts import Texts
from mdn_jax.text.text import ByteText
from tests.serving.running import make_engine


class Text:
    """A job, and what became of it."""

    def __init__(self, prompt, count, **options):
        self.events, self._ended = [], threading.Event()
        self.job = Job(
            prompt=prompt, max_tokens=count, sampling=Sampling(), receive=self._receive, **options
        )

    def _receive(self, event):
        self.events.append(event)
        if event.end is not None:
            self._ended.set()

    def end(self):
        self._ended.wait()
        return self.events[-1]


@pytest.fixture
def engine(model):
    engine = make_engine(model, Limits(slots=2))
    engine.device.warm = lambda: None
    yield engine
    engine.close()


def start(engine):
    engine.start()
    while engine.status == "starting":
        time.sleep(0.005)


def test_prompts_are_read_between_blocks(engine):
    calls = []
    read, decode = engine.device.read, engine.device.decode
    engine.device.read = lambda state, tokens: calls.append(len(tokens)) or read(state, tokens)
    engine.device.decode = lambda count, **options: (
        calls.append(f"block {count}") or decode(count, **options)
    )
    start(engine)
    first, long = Text([1], 10**6), Text([2] * 150, 3)
    engine.submit([first.job])
    while not first.events:
        time.sleep(0.005)
    engine.submit([long.job])
    assert long.end().end == "length"
    count = len(first.events)
    while len(first.events) < count + 3:
        time.sleep(0.005)
    engine.cancel(first.job)
    assert first.end().end == "cancelled"
    begin = calls.index(32)
    pieces = calls[begin : calls.index(22) + 1]
    # never two pieces without a block between them, and blocks are short meanwhile
    assert pieces == [32, "block 4", 32, "block 4", 32, "block 4", 32, "block 4", 22]
    assert "block 8" in calls[:begin]
    assert calls[-1] == "block 8"


def test_a_device_that_fails_is_told_to_all(engine, caplog):
    def fail(count, *, logprobs):
        raise RuntimeError("out of memory")

    engine.device.decode = fail
    start(engine)
    texts = [Text([1], 4) for _ in range(4)]
    engine.submit([text.job for text in texts])
    for text in texts:
        event = text.end()
        assert (event.end, event.message) == ("error", "the engine has failed: out of memory")
    assert engine.status == "failed"
    with pytest.raises(NotReadyError, match="failed"):
        engine.submit([texts[0].job])
    assert "out of memory" in caplog.text


def test_a_server_whose_engine_fails_ends(engine, capsys):
    def fail():
        raise RuntimeError("no device")

    engine.device.warm = fail
    service = Service(engine, Texts(ByteText()), name="tiny", limits=Limits())
    with listen("127.0.0.1", 0) as sock:
        assert run_server(Server(service.app(), engine, drain_seconds=1), engine, sock) == 1
    assert capsys.readouterr().err == "the engine has failed\n"


def test_texts_end_with_the_engine(engine):
    start(engine)
    texts = [Text([1], 10**6), Text([2], 10**6), Text([3], 10)]
    engine.submit([text.job for text in texts])
    engine.close()
    assert [text.end().end for text in texts] == ["cancelled"] * 3
    assert engine.status == "ended"
    assert engine.active == engine.waiting == 0

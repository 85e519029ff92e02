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
    engine.device.read = lambda parts, size: (
        calls.extend(len(part.tokens) for part in parts) or read(parts, size)
    )
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


def watched(engine):
    """The calls of the model that read prompts: the tokens of each part."""
    calls, read = [], engine.device.read
    engine.device.read = lambda parts, size: (
        calls.append([len(part.tokens) for part in parts]) or read(parts, size)
    )
    return calls


def tokens_of(texts):
    return [[token for event in text.events for token in event.tokens] for text in texts]


def test_prompts_are_read_together_and_each_as_if_alone(model):
    prompts = [[5 * i + k for k in range(length)] for i, length in enumerate((7, 40, 6, 3, 8, 2))]
    engine = make_engine(model, Limits(slots=8), prefix_bytes=0)
    engine.device.warm = lambda: None
    calls = watched(engine)
    start(engine)
    texts = [Text(prompt, 12, seed=i) for i, prompt in enumerate(prompts)]
    engine.submit([text.job for text in texts])
    assert {text.end().end for text in texts} == {"length"}
    # of a size together, at most four; the long one in pieces by itself, its end with the others
    assert calls == [[7, 6, 3, 8], [32], [8], [2]]
    together = tokens_of(texts)
    calls.clear()
    alone = [Text(prompt, 12, seed=i) for i, prompt in enumerate(prompts)]
    for text in alone:
        engine.submit([text.job])
        text.end()
    engine.close()
    assert calls == [[7], [32], [8], [6], [3], [8], [2]]
    assert tokens_of(alone) == together
    assert len(set(map(tuple, together))) == len(prompts)


def test_a_prompt_waits_for_what_another_one_leaves(model):
    engine = make_engine(model, Limits(slots=8))
    engine.device.warm = lambda: None
    calls = watched(engine)
    start(engine)
    shared = list(range(50))
    prompts = [[*shared, 60 + i, 70 + i] for i in range(4)] + [[90, 91]]
    texts = [Text(prompt, 4) for prompt in prompts]
    engine.submit([text.job for text in texts])
    assert {text.end().end for text in texts} == {"length"}
    engine.close()
    # the second leaves a state where they part, with which the third and fourth go on together
    assert [text.job.cached for text in texts] == [0, 32, 50, 50, 0]
    assert calls == [[32], [20], [2], [18], [2], [2, 2]]


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

"""`mdn-serve` as a process: from a checkpoint to an end by a signal."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import openai
import pytest

from mdn_jax.cli.serve import ServeConfig, build, main
from mdn_jax.errors import RunError

SMALL = ["--implementation", "xla", "--slots", "2", "--piece", "4", "--port", "0"]
RUN = "import sys; from mdn_jax.cli.commands import serve; sys.exit(serve())"


class Process:
    """A server of its own.

    Attributes:
      said: lines of standard error so far.
    """

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, arguments)], stderr=subprocess.PIPE, text=True
        )
        self.said, address = [], None
        while address is None:
            self.said.append(self.process.stderr.readline())
            assert self.said[-1], self.said  # it has ended
            address = re.search(r"http://127\.0\.0\.1:(\d+) ", self.said[-1])
        self.port = int(address[1])
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr))
        self._reader.start()

    def health(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())["status"]
        finally:
            connection.close()

    def ready(self):
        while self.health() != "ready":
            time.sleep(0.05)
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="k", max_retries=0
        )

    def ended(self):
        status = self.process.wait(60)
        self._reader.join()
        self.process.stderr.close()
        return status


@contextmanager
def serving(*arguments):
    process = Process(*arguments)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.ended()


def test_signals_drain_and_the_memory_of_prompts_stays(checkpoint, tmp_path):
    kept = tmp_path / "kept"
    options = [checkpoint, *SMALL, "--prefix-dir", kept, "--name", "mine", "--max-tokens", 10**7]
    asked = {"model": "mine", "prompt": "a prompt", "temperature": 0}
    with serving(*options) as server, server.ready() as client:
        before = client.completions.create(max_tokens=8, **asked)
        stream = client.completions.create(max_tokens=2000, stream=True, **asked)
        pieces = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        while server.health() == "ready":
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="is draining"):
            client.completions.create(**asked)
        pieces += stream
        assert pieces[-1].choices[0].finish_reason == "length"
        assert server.ended() == 0
    with serving(*options, "--drain-seconds", "0.2") as server, server.ready() as client:
        again = client.completions.create(max_tokens=8, **asked)
        assert again.choices == before.choices
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
        stream = client.completions.create(max_tokens=10**7, stream=True, **asked)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(stream)
        assert server.ended() == 130
    assert not any("Traceback" in line for line in server.said)


def test_a_second_signal_ends_at_once(checkpoint):
    with serving(checkpoint, *SMALL, "--max-tokens", 10**7) as server, server.ready() as client:
        stream = client.completions.create(
            model=checkpoint.name, prompt="a", max_tokens=10**7, stream=True
        )
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        while server.health() == "ready":
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 128 + signal.SIGTERM
        stream.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port: expected an int from 0 to 65535, got 70000"),
        (["--slots", "0"], "slots: expected an int >= 1, got 0"),
        (["--block", "0"], "block: expected an int >= 1, got 0"),
        (["--seconds", "inf"], "seconds: expected seconds >= 0, got inf"),
        (["--prefix-mb", "nan"], "prefix_mb: expected a number >= 0, got nan"),
    ],
)
def test_a_flag_that_does_not_fit(checkpoint, flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(checkpoint), *flags])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_place_that_does_not_fit(tmp_path, capsys):
    assert main([str(tmp_path), "--port", "0"]) == 1
    assert "holds neither" in capsys.readouterr().err
    assert main([str(tmp_path), "--host", "203.0.113.1", "--port", "0"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mdn-serve: error: port: expected a free one on 203.0.113.1, got 0")
    assert said.count("\n") == 1


def test_steps_that_a_model_does_not_have(checkpoint, capsys):
    flags = ["--steps", "kernels", "--port", "0", "--implementation", "xla"]
    assert main([str(checkpoint), *flags]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith('mdn-serve: error: steps: "kernels" expects ')
    assert said[-1].endswith("""got 'xla'; use "layers\"""")


def test_keys_and_templates(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MDN_API_KEY", "from outside")
    options = {"checkpoint": checkpoint, "implementation": "xla", "piece": 8}
    _, service = build(ServeConfig(**options))
    assert service._key == b"Bearer from outside"
    assert "no chats: chat_template: expected a file" in capsys.readouterr().err
    for key in ("", " a", "ä"):
        with pytest.raises(ValueError, match="api_key: expected printable ASCII"):
            build(ServeConfig(**options, api_key=key))
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    _, service = build(ServeConfig(**options, chat_template=template))
    assert service._texts.chat([{"role": "user", "content": "ab"}]) == [256, 97, 98]
    with pytest.raises(RunError, match="expected a file with a template"):
        build(ServeConfig(**options, chat_template=tmp_path / "none"))

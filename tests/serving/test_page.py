"""The page at `/` in a real browser."""

import json
import re
from importlib.resources import files

import pytest

from tests.serving.browser import CHROMIUM, Browser
from tests.serving.running import server
from tests.serving.test_completions import expected

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

ASK = """(async () => {
  const set = (id, value) => { document.getElementById(id).value = value; };
  set("prompt", PROMPT); set("tokens", TOKENS); set("temperature", 0); set("key", KEY);
  delete document.body.dataset.done;
  document.getElementById("form").requestSubmit();
  const wait = () => new Promise(done => setTimeout(done, 5));
  const shown = document.getElementById("text");
  while (STOP && shown.childNodes.length < 2) await wait();
  if (STOP) document.getElementById("go").click();
  while (!document.body.dataset.done) await wait();
  const text = (id) => document.getElementById(id).textContent;
  return ["model", "text", "figures", "error", "go"].map(text);
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def ask(browser, prompt, tokens, *, key="", stop=False):
    values = {"PROMPT": prompt, "TOKENS": tokens, "KEY": key, "STOP": stop}
    script = ASK
    for name, value in values.items():
        script = script.replace(name, json.dumps(value))
    return browser.run(script)


def test_the_page_streams_a_text(browser, running, model, tmp_path):
    browser.open(running.url)
    prompt = "<b>& a prompt</b>\n"
    name, text, figures, error, button = ask(browser, prompt, 60)
    assert text == prompt + expected(model, prompt, 60, temperature=0.0)
    assert (name, error, button) == ("tiny", "", "Continue")
    state = running.engine.device.state_bytes
    assert re.fullmatch(
        rf"60 tokens · first after \d+ ms · [\d.,]+ tokens/s · state {state} B at position 79",
        figures,
    )
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_stop_ends_the_text_on_the_server_too(browser, running):
    ended = running.engine.metrics.ended.labels("cancelled")
    before = ended._value.get()
    browser.open(running.url)
    _, text, _, error, button = ask(browser, "a", 4096, stop=True)
    assert (text[0], error, button) == ("a", "", "Continue")
    running.idle()
    assert ended._value.get() == before + 1


def test_the_page_says_what_went_wrong(browser, running, model):
    browser.open(running.url)
    assert ask(browser, "a", 5000)[3].startswith("max_tokens: expected an int from 0 to 4096")
    with server(model, api_key="secret") as keyed:
        browser.open(keyed.url)
        assert "API key, got none" in ask(browser, "a", 5)[3]
        assert ask(browser, "a", 5, key="secret")[3] == ""


def test_the_page_needs_nothing_from_elsewhere():
    page = files("mdn_jax.serving").joinpath("page.html").read_text("utf-8")
    assert not re.findall(r"https?://|src=|@import|url\(", page)

"""Chats by a template, cut by who speaks. Needs jinja2."""

import json
import subprocess
import sys

import pytest

from mdn_jax.errors import RunError
from mdn_jax.text.chat import ChatTemplate, Stretch, find_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye."},
    {"role": "user", "content": "?"},
]


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.exceptions", None)
    with pytest.raises(RunError, match="the extra 'huggingface'"):
        ChatTemplate(CHATML)


def test_a_run_starts_without_the_packages_of_templates_and_pictures():
    code = "import sys, train.cli.train; print(sys.modules.keys() & {'jinja2', 'matplotlib'})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.fixture
def jinja():
    pytest.importorskip("jinja2")


@pytest.mark.usefixtures("jinja")
def test_only_what_the_assistant_says_is_learned():
    assert ChatTemplate(CHATML).stretches(MESSAGES) == [
        Stretch(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        Stretch("4.<|im_end|>\n", True),
        Stretch("<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n", False),
        Stretch("Bye.<|im_end|>\n", True),
    ]


@pytest.mark.usefixtures("jinja")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "expected a Jinja template, got one with an error"),
        ("{{ raise_exception('no system') }}", "messages that the template takes.*no system"),
        ("{{ messages[0].content.__class__.mro() }}", "messages that the template takes"),
        ("{{ messages | length }}", "begins with that of its beginning"),
    ],
)
def test_a_template_that_does_not_fit_is_named(source, message):
    with pytest.raises(RunError, match=message):
        ChatTemplate(source).stretches(MESSAGES)


@pytest.mark.usefixtures("jinja")
def test_where_a_template_is_found(tmp_path):
    with pytest.raises(RunError, match=r"chat_template: expected a file with a Jinja template"):
        find_template(None, None)
    config = {"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for tokenizer in (tmp_path, tmp_path / "tokenizer.json"):
        assert find_template(None, str(tokenizer)).render([]) == "<s>!"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}?")
    assert find_template(None, str(tmp_path)).render([]) == "<s>?"
    (tmp_path / "mine").write_text("mine")
    assert find_template(str(tmp_path / "mine"), str(tmp_path)).render([]) == "mine"
    with pytest.raises(RunError, match="chat_template: expected a file with a template, got"):
        find_template(str(tmp_path / "gone"), None)

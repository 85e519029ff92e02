"""Every command of the site's pages runs, at the smallest sizes, or is read by its program.

A page is a session: its commands run in their order and share a directory, which looks like a clone
after the first run. `readers.py` says what runs and what is only read.
"""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest

import configs
from mdn_jax import MDNConfig
from tests.site.pages import PAGES, ROOT, Command, commands
from tests.site.readers import NOT_RUN, RUN, STEPS, find, made_of, read, smaller
from tests.text.helpers import TEXTS, write_bpe
from tests.tiny import TINY_MODEL
from tests.train.helpers import TINY_RUN
from tests.train.sharing import shared_steps
from train.config import TrainConfig
from train.loop import train

FROM_NOTHING = ("README", "first_run")  # pages that need no run before them
SMOKE = configs.CONFIGS["smoke"]
SIZES = TINY_RUN | {
    "steps": int(STEPS),
    "log_every": 50,
    "eval_every": 100,
    "checkpoint_every": 100,
}


def tiny() -> TrainConfig:
    """The recipe `smoke`, at the smallest sizes."""
    return dataclasses.replace(SMOKE(), model=MDNConfig(**TINY_MODEL), **SIZES)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone has after the first run, with documents of the reader's."""
    directory = tmp_path_factory.mktemp("site") / "clone"
    for name in ("notes", "books", ".venv/lib"):
        (directory / name).mkdir(parents=True)
    for name in ("docs", "examples", "deploy", "README.md"):
        (directory / name).symlink_to(ROOT / name)
    for i, text in enumerate(TEXTS):
        (directory / "notes" / f"{i}.txt").write_text(text)
        (directory / ".venv" / "lib" / f"{i}.py").write_text(f"# {text}\n")
    records = (json.dumps({"text": text, "body": text}) + "\n" for text in TEXTS)
    (directory / "books" / "a.jsonl").write_text("".join(records))
    write_bpe(directory / "gpt2")
    toml = re.search(r"(?:^    \w.+\n)+", (ROOT / "docs" / "configuration.md").read_text(), re.M)
    text = re.sub("(?m)^    ", "", toml[0])
    assert 'recipe = "smoke"' in text
    (directory / "my_run.toml").write_text(text.replace("hidden_size = 256", "hidden_size = 16"))
    with shared_steps():  # of all pages: most of them train or resume the same run
        with pytest.MonkeyPatch.context() as patch:
            at_smallest_size(patch, directory)
            train(dataclasses.replace(tiny(), output_dir=str(directory / "runs" / "smoke")))
        yield directory


def at_smallest_size(patch, directory):
    patch.setitem(configs.CONFIGS, "smoke", tiny)
    # in place of the source text of the standard library
    notes = sorted((directory / "notes").iterdir())
    patch.setattr("mdn_jax.text.files.standard_library_files", lambda: notes)


def perform(command: Command, directory) -> int:
    if command.words[0] in ("echo", "for"):
        return subprocess.run(command.text, shell=True, cwd=directory, check=False).returncode
    words = made_of(command.words)
    if ">" in words:
        words = words[: words.index(">")]
    found = find(smaller(words))
    why = next((why for what, why in NOT_RUN.items() if re.match(what, " ".join(words))), None)
    try:
        if command.shown or why is not None:
            read(words)
        elif found is not None:
            main, arguments = found
            return main(arguments)
        else:
            raise AssertionError(
                "say in tests/site/readers.py how it is run (RUN), or why it is only read (NOT_RUN)"
            )
    except SystemExit as end:  # --help, or a command line that does not fit
        return int(end.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page(page, clone, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "clone"
    shutil.copytree(clone, directory, symlinks=True)
    if page.stem in FROM_NOTHING:
        shutil.rmtree(directory / "runs")
    at_smallest_size(monkeypatch, directory)
    monkeypatch.chdir(directory)
    for command in commands(page):
        capsys.readouterr()
        try:
            status = perform(command, directory)
        except Exception as error:
            raise AssertionError(f"{command.place}\n{error}") from error
        out = capsys.readouterr()
        assert status == 0, f"{command.place}\n{out.out[-2000:]}{out.err[-2000:]}"


def test_no_row_of_the_tables_is_left_over():
    lines = [" ".join(made_of(x.words)) for page in PAGES for x in commands(page)]
    assert [x for x in NOT_RUN if not any(re.match(x, line) for line in lines)] == []
    assert [x for x in RUN if not any(line.startswith(x) for line in lines)] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    python -m train smoke --stepz 3", "2"),
        ("    python -m benchmarks tasks --nope", "2"),
        ("    python -m benchmarks nothing", "2"),
        ("| a | `python -m train nothing` |", "2"),
        ("    make nothing", "nothing"),
        ("    pip install '.[nothing]'", "nothing"),
        ("    pytest tests/nothing", "nothing"),
        ("    python examples/nothing.py", "nothing"),
        ("    bash nothing.sh", "tests/site/readers.py"),
        ("```bash\nnothing \\\n  --at-all\n```", "tests/site/readers.py"),
    ],
)
def test_a_command_that_does_not_exist_is_found(text, expected, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n{text}\n")
    (command,) = commands(page)
    try:
        found = str(perform(command, tmp_path))
    except AssertionError as error:
        found = str(error)
    assert expected in found

"""mdn-inspect as a user meets it."""

import json
import math
import re
import shutil

import pytest

from mdn_jax.cli.inspect_checkpoint import main

OPTIONS = ["--implementation", "scan", "--batch-size", "2", "--row", "16", "--tokens", "64"]


def run(*arguments):
    return main([str(x) for x in (*arguments, *OPTIONS)])


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("some text, and some more of it; " * 10)
    return file


@pytest.mark.slow
def test_table_json_and_figures(checkpoint, tmp_path, text, capsys):
    directory = tmp_path / "model"
    shutil.copytree(checkpoint, directory)
    assert run(directory, "--files", text) == 0
    out = capsys.readouterr().out
    assert out.startswith("64 tokens in 4 rows of 16\n")
    (line,) = re.findall(r"^ +0 +0 .*$", out, re.MULTILINE)
    results = json.loads((directory / "inspection" / "inspection.json").read_text())
    (head,) = results["heads"]
    assert (results["tokens"], results["rows"], results["window"]) == (64, 4, 64)
    low, middle, high = (head["alpha"][q] for q in ("5%", "50%", "95%"))
    assert f"{middle:.2f} ({low:.2f}-{high:.2f})" in line
    assert f" {head['spectral_radius']['50%']:.3f} " in line
    assert 0 < head["memory_half_life"] < math.inf
    assert head["unstable"] == 0
    for name in ("eigenvalues.png", "half_life.png", "gates.png"):
        assert (directory / "inspection" / name).read_bytes().startswith(b"\x89PNG"), name
    assert run(directory, "--files", text, "--json", "--output-dir", tmp_path / "other") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == results
    assert (tmp_path / "other" / "gates.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["checkpoint: expected the output directory of a run or of a conversion"]),
        (["{checkpoint}", "--files", "none/*.txt"], ["files: expected a file or a glob"]),
        (["{checkpoint}", "--files", "{empty}"], ["files: expected files with text in them"]),
        (["{checkpoint}", "--step", "7"], ["step: expected one of [0]", "got 7"]),
    ],
)
def test_bad_requests_are_one_clear_line(checkpoint, tmp_path, text, capsys, arguments, words):
    (tmp_path / "empty.txt").write_text("")
    places = {"checkpoint": checkpoint, "empty": tmp_path / "empty.txt"}
    arguments = [x.format(**places) for x in arguments]
    files = [] if "--files" in arguments else ["--files", text]
    assert run(*arguments, *files, "--output-dir", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("mdn-inspect: error: ")
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokens", "row", "batch-size", "window"])
def test_a_bad_number_is_named(capsys, name):
    with pytest.raises(SystemExit) as error:
        main(["nothing", f"--{name}", "0"])
    assert error.value.code == 2
    assert f"{name.replace('-', '_')}: expected an int >= 1, got 0" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    assert "--output-dir" in capsys.readouterr().out

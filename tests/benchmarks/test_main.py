"""The command line of `mdn-bench`."""

import sys

import pytest

from benchmarks.main import main


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mdn-bench", *arguments])
    main()


def test_kernels(monkeypatch, capsys):
    arguments = "kernels --shape 1 20 1 16 16 --implementations scan --runs 2 --parts kept"
    run(monkeypatch, *arguments.split(), "--no-neighbour")
    out = capsys.readouterr().out
    assert "B,T,H,K,V = 1,20,1,16,16" in out
    assert "| scan " in out


def test_check(monkeypatch, capsys):
    run(monkeypatch, "check", "--interpret", "--show", "--only", "float16")
    assert "float16" in capsys.readouterr().out


def test_stages(monkeypatch):
    with pytest.raises(SystemExit, match="multiple of 64"):
        run(monkeypatch, "stages", "--shape", "1", "20", "1", "16", "16", "--interpret")

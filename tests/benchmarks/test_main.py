"""The command line of `python -m benchmarks`."""

import pytest

from benchmarks.command import main


def test_kernels(capsys):
    arguments = "kernels --shape 1 20 1 16 16 --implementations scan --runs 2 --parts kept"
    main([*arguments.split(), "--no-neighbour"])
    out = capsys.readouterr().out
    assert "B,T,H,K,V = 1,20,1,16,16" in out
    assert "| scan " in out


def test_check(capsys):
    main(["check", "--interpret", "--show", "--only", "float16"])
    assert "float16" in capsys.readouterr().out


def test_stages():
    with pytest.raises(SystemExit, match="multiple of 64"):
        main(["stages", "--shape", "1", "20", "1", "16", "16", "--interpret"])

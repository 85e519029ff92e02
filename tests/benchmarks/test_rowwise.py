"""`python -m benchmarks rowwise` in the interpreter: every kernel agrees with XLA's code."""

from benchmarks.command import main


def test_all_kernels(capsys):
    sizes = "--tokens 8 --hidden 16 --heads 2 --head 8 --mlp 16 --vocab 50 --logits 4"
    main(["rowwise", "--interpret", "--runs", "2", "--dtype", "float32", *sizes.split()])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[3:]] == ["kernel", "xla"] * 4

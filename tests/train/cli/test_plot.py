"""`python -m train plot` as a user meets it."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from train.cli.plot import main
from train.metrics.curves import _running_mean


def write_run(directory, *, steps=60, seed=0, scale=1.0, bytes_per_token=4.0):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"batch_size": 16, "sequence_length": 256}))
    rng = np.random.default_rng(seed)
    records = []
    for step in range(10, 10 * steps + 1, 10):
        loss = scale * (1.5 + 4 * np.exp(-step / 120)) + rng.normal(0, 0.04)
        records.append(
            {
                "step": step,
                "loss": None if step == 300 else loss,
                "grad_norm": None if step == 300 else float(np.exp(rng.normal(0, 0.3))),
                "tokens_per_second": round(30_000 + rng.normal(0, 500)),
            }
        )
        if step % 100 == 0:
            per_byte = (loss + 0.1) / bytes_per_token
            held_out = {"held_out_loss": loss + 0.1, "held_out_nats_per_byte": per_byte}
            records.append({"step": step, **held_out})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines + '{"step": 6')  # a crash's last line
    return directory


def test_several_runs_in_one_picture(tmp_path, capsys):
    runs = [write_run(tmp_path / name, seed=i, scale=1 + i / 10) for i, name in enumerate("ab")]
    output = tmp_path / "out.png"
    arguments = [str(x) for x in (*runs, "--output", output, "--x", "tokens", "--smooth", 5)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"a, b: {output}\n"
    image = imread(output)
    assert image.shape[0] > 800
    assert image.shape[1] > 1200
    pixels = np.unique(np.rint(255 * image[:, :, :3]).astype(int).reshape(-1, 3), axis=0)
    assert {(31, 119, 180), (255, 127, 14)} <= set(map(tuple, pixels.tolist()))  # a line for each
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out.png"]


def labels_and_losses(monkeypatch, arguments):
    drawn = []
    monkeypatch.setattr(Figure, "align_ylabels", lambda figure, axes: drawn.append(axes))
    assert main(arguments) == 0
    losses, held_out = drawn[0][0]
    return losses.get_ylabel(), held_out.get_ylabel(), [x.get_ydata() for x in losses.lines]


def test_nats_a_token_and_nats_a_byte_are_kept_apart(tmp_path, monkeypatch, capsys):
    one, other = (str(write_run(tmp_path / name, bytes_per_token=4.0)) for name in "ab")
    in_bytes = str(write_run(tmp_path / "c", bytes_per_token=1.0))
    early = str(write_run(tmp_path / "d", steps=9))
    output = ["--output", str(tmp_path / "out.png")]
    *labels, (x, y) = labels_and_losses(monkeypatch, [one, other, *output])
    assert labels == ["training loss (nats/token)", "held-out loss (nats/token)"]
    np.testing.assert_array_equal(x, y)
    *labels, (x, y) = labels_and_losses(monkeypatch, [one, in_bytes, *output])
    assert labels == ["training loss (nats/byte)", "held-out loss (nats/byte)"]
    np.testing.assert_allclose(4 * x, y)
    assert labels_and_losses(monkeypatch, [early, one, *output])[0] == labels[0].replace(
        "byte", "token"
    )
    capsys.readouterr()
    assert main([in_bytes, early, *output]) == 1
    assert f"got none in {early}" in capsys.readouterr().err


def test_a_running_mean_leaves_out_what_is_not_finite():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(_running_mean(values, 2), [1, 2, 3, 5, 6])
    assert np.isnan(_running_mean(values[2:3], 2)).all()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nowhere"], 1, "runs: expected a directory with metrics.jsonl, got nowhere"),
        (["nowhere", "--names", "a", "b"], 2, "names: expected 1 (one a run) or none, got 2"),
        (["nowhere", "--smooth", "0"], 2, "smooth: expected an int >= 1, got 0"),
    ],
)
def test_errors(arguments, status, words, capsys):
    if status == 2:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    else:
        assert main(arguments) == status
    assert words in " ".join(capsys.readouterr().err.split()).replace("│ ", "")


def test_damage_is_said_and_left_out(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=4)
    metrics = run / "metrics.jsonl"
    first, *others = metrics.read_bytes().split(b"\n")
    metrics.write_bytes(b"\n".join([first, b"\x80 3 {", *others]))
    assert main([str(run), "--output", str(tmp_path / "out.png")]) == 0
    error = capsys.readouterr().err
    assert error == (
        f"python -m train plot: left out of {metrics}: 1 line(s) that are no record, "
        "the first is line 2\n"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "config.json: expected a run's configuration in"),
        ('{"batch_size": 8}', "config.json: expected an int sequence_length >= 1 in"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path, capsys, content, words):
    run = write_run(tmp_path / "run", steps=4)
    (run / "config.json").write_text(content)
    assert main([str(run), "--output", str(tmp_path / "out.png")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"python -m train plot: error: {words} {run}")
    assert len(error.splitlines()) == 1


def test_a_run_without_a_step_is_named(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path)]) == 1
    assert "expected metrics of at least one step" in capsys.readouterr().err

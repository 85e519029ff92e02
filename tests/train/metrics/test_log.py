import errno
import io
import json
import math
import os

import pytest

from mdn_jax.errors import RunError
from train.metrics.log import MetricsLog, Progress, read_metrics, scan_metrics
from train.metrics.loss_curve import plot_losses


def test_one_json_object_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, resume_step=0) as log:
        log.write(step=1, loss=2.5, skipped=0)
        log.write(step=2, loss=math.nan, grad_norm=math.inf, skipped=1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 2.5, "skipped": 0},
        {"step": 2, "loss": None, "grad_norm": None, "skipped": 1},
    ]


def test_resuming_keeps_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, resume_step=0) as log:
        for step in range(1, 6):
            log.write(step=step, loss=step)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    with MetricsLog(path, resume_step=3) as log:
        log.write(step=4, loss=40)
        assert [record["loss"] for record in log.records] == [1, 2, 3, 40]
    assert [record["loss"] for record in read_metrics(path)] == [1, 2, 3, 40]


BAD_LINES = [
    b'{"step": 3, "loss": 2.',
    b"\xff\xfe\x00",
    b"7",
    b"[]",
    b"null",
    b'{"loss": 1.0}',
    b'{"step": "3"}',
    b'{"step": true}',
    b'{"step": 2.0}',
    b'{"step": 3, "loss": NaN}',
    b'{"step": 3, "loss": 1e999}',
    b'{"step": 3, "loss": 1' + 400 * b"0" + b"}",
    b'{"step": 3, "loss": "low"}',
    b"[" * 200_000,
    b'{"a":' * 200_000,
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:24].decode(errors="replace"))
def test_a_broken_line_costs_that_line_alone(tmp_path, capsys, bad):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "loss": %d}' % (step, step) for step in (1, 2, 3, 4, 5)]
    before = b"\n".join([*lines[:2], bad, b"", *lines[2:], b'{"step": 6, "l'])
    path.write_bytes(before)
    assert scan_metrics(path).broken == [3]
    with MetricsLog(path, resume_step=4) as log:
        log.write(step=5, loss=50)
    assert [record["loss"] for record in read_metrics(path)] == [1, 2, 3, 4, 50]
    copy = tmp_path / "metrics.jsonl.damaged"
    assert capsys.readouterr().out == (
        f"left out of {path}: 1 line(s) that are no record, the first is line 3; "
        f"the file as it was is {copy}\n"
    )
    assert copy.read_bytes() == before
    with MetricsLog(path, resume_step=5):
        pass
    assert capsys.readouterr().out == ""


def test_copies_of_damaged_files_do_not_replace_each_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in (b"a\n", b"b\n", b"c\n"):
        path.write_bytes(text)
        MetricsLog(path, resume_step=1).__exit__(None, None, None)
    copies = sorted(p.read_bytes() for p in tmp_path.glob("metrics.jsonl.damaged*"))
    assert copies == [b"a\n", b"b\n", b"c\n"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    for resume_step in (0, 3):
        with pytest.raises(RunError, match=r"metrics.jsonl, got: Is a directory"):
            MetricsLog(tmp_path / "metrics.jsonl", resume_step=resume_step)


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with MetricsLog(path, resume_step=0) as log:
            log.write(step=1, loss=1.0)
    assert len(read_metrics(path)) == 1


def test_plain_progress_is_sparse(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("train.metrics.log.time.monotonic", lambda: now)
    with Progress(start=10, steps=110) as progress:
        for step in range(11, 111):
            now += 60 if step == 11 else 1  # the first step compiles
            progress.advance()
            progress.report(step, 2.0, 1234.5, 0.5 if step > 50 else 0.01)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 26/110  loss 2.000  1,234 tokens/s  1.4 min left"
    assert "1,234 tokens/s, 50% of the time waiting for data  " in lines[-1]
    assert len(lines) == 6


def test_plot_is_a_png(tmp_path):
    path = tmp_path / "loss.png"
    records = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": None},
        {"step": 2, "held_out_loss": 4.0},
    ]
    plot_losses(records, unigram=3.2, title="test", path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=0) as log:
        log._file.close()
        log._file = FullDisk()
        with pytest.raises(
            RunError,
            match=r"output_dir: .*metrics.jsonl, got: No space left.*; .* no check.* start again",
        ):
            log.write(step=1, loss=2.0)

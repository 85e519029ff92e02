"""TensorBoard and Weights & Biases get what the metrics file gets."""

import math
import struct
import sys
import types

import pytest

from mdn_jax.errors import RunError
from tests.train.helpers import tiny_config
from train.config_sections import ReportConfig
from train.metrics.log import MetricsLog
from train.metrics.writers import TENSORBOARD_DIRECTORY, WANDB_ID_FILE, check_packages, make_writers


def write_steps(config, *, resume_step=0):
    config.directory.mkdir(exist_ok=True)
    path = config.directory / "metrics.jsonl"
    with MetricsLog(
        path, resume_step=resume_step, others=lambda: make_writers(config, resume_step=resume_step)
    ) as log:
        log.write(step=resume_step + 1, loss=2.5, **{"grad_norm/gates": 0.5})
        log.write(step=resume_step + 2, loss=math.nan, skipped=1)


def events(path):
    """The records of an event file: length, its checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_files_hold_the_scalars(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run", report=ReportConfig(tensorboard=True))
    write_steps(config)
    write_steps(config, resume_step=1)
    files = sorted((config.directory / TENSORBOARD_DIRECTORY).iterdir())
    scalars = [
        [
            (event.step, value.tag, value.simple_value)
            for event in events(path)
            for value in event.summary.value
            if value.HasField("simple_value")
        ]
        for path in files
    ]
    expected = [
        [(n, "loss", 2.5), (n, "grad_norm/gates", 0.5), (n + 1, "skipped", 1)] for n in (1, 2)
    ]
    assert sorted(scalars) == expected
    restarts = [e.step for p in files for e in events(p) if e.session_log.status == 1]
    assert restarts == [1, 2]  # what a viewer drops: everything from there in older files


class FakeRun:
    """A run of the package's interface that remembers what it is told."""

    def __init__(self, options):
        self.options, self.id = options, options["id"] or "fresh"
        self.logged, self.metrics, self.finished = [], [], False

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def finish(self):
        self.finished = True


def test_wandb_gets_the_values_and_resumes_its_run(tmp_path, monkeypatch):
    runs = []

    def init(*, project, name, id, resume, dir, mode, config):
        runs.append(FakeRun(locals()))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    report = ReportConfig(wandb="offline", wandb_project="models")
    config = tiny_config(tmp_path, tmp_path / "run", report=report)
    write_steps(config)
    assert (config.directory / WANDB_ID_FILE).read_text() == "fresh\n"
    write_steps(config, resume_step=1)
    first, second = runs
    assert first.logged == [
        {"step": 1, "loss": 2.5, "grad_norm/gates": 0.5},
        {"step": 2, "skipped": 1},
    ]
    assert [run.logged[0]["step"] for run in runs] == [1, 2]
    assert first.metrics == [("step", None), ("*", "step")]
    assert first.finished
    assert second.finished
    assert first.options["mode"] == "offline"
    assert first.options["project"] == "models"
    assert first.options["config"]["steps"] == config.steps
    assert (first.options["id"], first.options["resume"]) == (None, None)
    assert (second.options["id"], second.options["resume"]) == ("fresh", "allow")


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (
            ReportConfig(tensorboard=True),
            r"report.tensorboard: .*tensorboardX.*the extra .tensorboard",
        ),
        (ReportConfig(wandb="online"), r"report.wandb: expected the package wandb.*extra .wandb"),
    ],
)
def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch, report, words):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RunError, match=words):
        check_packages(tiny_config(tmp_path, tmp_path / "run", report=report))


def test_nothing_is_opened_unless_asked_for(tmp_path):
    assert make_writers(tiny_config(tmp_path, tmp_path / "run"), resume_step=0) == []

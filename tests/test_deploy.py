"""The scripts that start a run on many hosts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from train.cli.train import parse

ROOT = Path(__file__).parents[1]


def started(*arguments, directory=ROOT):
    """The command that `deploy/run.sh` would start."""
    environment = {"MDN_PYTHON": "echo", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["deploy/run.sh", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("written", ["--output-dir {}", "--output-dir={}"])
def test_the_same_line_starts_a_run_and_goes_on(tmp_path, written):
    directory = tmp_path / "run"
    words = ["smoke", *written.format(directory).split(), "--steps", "3"]
    line = " ".join(["-m", "train", *words])
    assert started(*words).stdout == f"{line}\n"
    (directory / "checkpoints").mkdir(parents=True)
    assert started(*words).stdout == f"{line}\n"
    (directory / "checkpoints" / "3").mkdir()
    assert started(*words).stdout == f"{line} --resume\n"


def test_a_run_without_a_directory_is_refused():
    done = started("smoke")
    assert done.returncode == 2
    assert done.stderr == "run.sh: expected --output-dir among the arguments, got smoke\n"


@pytest.mark.parametrize("path", sorted(ROOT.glob("deploy/*.sh")), ids=lambda x: x.name)
def test_scripts_parse(path):
    subprocess.run([shutil.which("bash"), "-n", path], check=True)


def test_hosts_under_kubernetes_find_each_other():
    text = (ROOT / "deploy" / "jobset.yaml").read_text()
    arguments = re.search(r"args:\n((?: +- .*\n)+)", text)[1].replace("$(INDEX)", "3").split()[1::2]
    config = parse(arguments)
    several = config.distributed
    assert (several.processes, several.index) == (4, 3)
    assert several.coordinator == "mdn-train-0-0.mdn:1234"  # jobset, job, its first pod, service
    assert f"parallelism: {several.processes}" in text
    assert "containerPort: 1234" in text


@pytest.mark.parametrize("name", ["jobset.yaml", "slurm.sh", "Containerfile"])
def test_files_that_are_named_exist(name):
    text = (ROOT / "deploy" / name).read_text()
    for path in re.findall(r"(?:deploy|train|configs)/[\w./]+\w", text):
        assert (ROOT / path).exists(), path

"""Checkpoints as files: what is damaged is refused in one line, or was of no use."""

import contextlib
import dataclasses
import gc
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax.errors import RunError
from mdn_jax.saved import model as saved_model
from mdn_jax.saved.digest import OLD, digests
from mdn_jax.saved.model import (
    complete_steps,
    find_checkpoint,
    iterate_params,
    load_model,
    read_params,
)
from mdn_jax.saved.record import DamagedError, read_position, read_record
from tests.train.helpers import tiny_config
from train.checkpointing.checkpoints import Checkpoints
from train.run import Run
from train.stacking import by_layer

# Orbax raises at the first array and leaves the readers of the others to fail alone
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEP, EARLIER = 40, 30


@pytest.fixture(autouse=True)
def _no_readers_left():
    yield
    gc.collect()  # while their warnings are ignored


@pytest.fixture(scope="module")
def written(corpus, tmp_path_factory):
    """A trainer and its directory with two checkpoints, of a state that nobody trained."""
    directory = tmp_path_factory.mktemp("written") / "run"
    config = tiny_config(corpus, directory, resume=True).resolved()
    trainer = Run(config)
    state = trainer.initial_state()
    with Checkpoints(config) as checkpoints:
        for step, loss in ((EARLIER, 2.0), (STEP, 3.0)):
            state = state._replace(step=jnp.full_like(state.step, step))
            position = {"step": step}
            checkpoints.save(
                state, data=position, corpus=trainer.data.fingerprint, held_out_loss=loss
            )
    return trainer, directory


@pytest.fixture
def run(written, tmp_path):
    """A copy of it to damage."""
    trainer, directory = written
    shutil.copytree(directory, tmp_path / "run")
    return trainer, tmp_path / "run"


def resume(trainer, directory, **changes):
    """What is restored, by layer."""
    config = dataclasses.replace(trainer.config, output_dir=str(directory), **changes)
    with Checkpoints(config) as checkpoints:
        restored = checkpoints.restore(
            trainer.like, corpus=trainer.data.fingerprint, begin=trainer.begin
        )
    assert jax.tree.structure(restored.state) == jax.tree.structure(trainer.like)
    return restored._replace(state=by_layer(restored.state))


def parameters(directory):
    return read_params(find_checkpoint(directory))


def arrays(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def refused(call, *arguments, **changes):
    """The one line that a call is refused with."""
    with pytest.raises(RunError) as error:
        call(*arguments, **changes)
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 900, message
    assert "tensorstore_spec" not in message
    return message


def gone(file, data):
    file.unlink()


def no_file(file, data):
    file.unlink()
    file.mkdir()


def bit(number):
    def flip(file, data):
        changed = bytearray(data)
        changed[number // 8] ^= 1 << number % 8
        file.write_bytes(changed)

    return flip


@contextlib.contextmanager
def damaged(file, damage):
    data = file.read_bytes()
    damage(file, data)
    yield
    if file.is_dir():
        file.rmdir()
    file.write_bytes(data)


@pytest.mark.parametrize("item", ["run", "data"])
def test_every_bit_of_the_json_is_harmless_or_refused(run, item):
    _, directory = run
    path = directory / "checkpoints" / str(STEP)
    file = path / item / "metadata"

    def read():
        record = read_record(path)
        return record, read_position(path, record)

    right, count = read(), 8 * file.stat().st_size
    for number in random.Random(1).sample(range(count), min(count, 300)):
        with damaged(file, bit(number)):
            try:
                assert read() == right, number
            except DamagedError as damage:
                assert len(str(damage).splitlines()) == 1  # noqa: PT017


@pytest.mark.parametrize("damage", [gone, no_file])
def test_a_missing_data_file_is_one_line_everywhere(run, damage):
    trainer, directory = run
    state = directory / "checkpoints" / str(STEP) / "state"
    largest = max(state.glob("**/d/*"), key=lambda file: file.stat().st_size)
    with damaged(largest, damage):
        for call in (parameters, lambda x: list(iterate_params(find_checkpoint(x)))):
            message = refused(call, directory)
            assert f"checkpoint: expected a complete one in {state.parent}" in message
        message = refused(resume, trainer, directory)
        assert f"checkpoint of step {STEP} in {state.parents[1]}" in message
        assert message.endswith(f"continue with --resume-step {EARLIER}")
    assert arrays(resume(trainer, directory).state.params) == arrays(parameters(directory))


def test_weights_in_another_order_are_named_by_every_reader(run, tmp_path):
    trainer, directory = run
    config = dataclasses.replace(trainer.config, output_dir=str(tmp_path / "other"))
    state = resume(trainer, directory).state
    state = state._replace(params=state.params | {"lm_head": state.params["lm_head"][:, ::-1]})
    with Checkpoints(config) as checkpoints:
        corpus = trainer.data.fingerprint
        checkpoints.save(state, data={"step": STEP}, corpus=corpus, held_out_loss=None)
    assert arrays(parameters(config.directory)) == arrays(state.params)
    # intact files, but of another state than the record's
    there = directory / "checkpoints" / str(STEP) / "state"
    shutil.rmtree(there)
    (config.directory / "checkpoints" / str(STEP) / "state").rename(there)
    words = "wrong digests of 1 array(s): params.lm_head"
    assert words in refused(parameters, directory)
    assert words in refused(lambda: list(iterate_params(find_checkpoint(directory))))
    assert words in refused(lambda: load_model(find_checkpoint(directory)))
    assert words in refused(resume, trainer, directory)


@pytest.mark.parametrize(
    "text",
    ['{"step": 31}', '{"step": 40, "parts": []}', "{}", "", "[40]", "[" * 10**5, '{"a":' * 10**5],
    ids=["other", "more", "nothing", "empty", "list", "deep list", "deep object"],
)
def test_another_position_in_the_data_is_refused(run, text):
    trainer, directory = run
    (directory / "checkpoints" / str(STEP) / "data" / "metadata").write_text(text)
    assert "data/metadata" in refused(resume, trainer, directory)


@pytest.mark.parametrize("text", ["{}", "", "null", '{"config":' * 10**5, "[" * 10**5])
def test_another_record_is_refused(run, text):
    trainer, directory = run
    (directory / "checkpoints" / str(STEP) / "run" / "metadata").write_text(text)
    assert "run/metadata" in refused(resume, trainer, directory)
    assert "run/metadata" in refused(find_checkpoint, directory)


def test_a_checkpoint_under_another_step_is_refused(run):
    trainer, directory = run
    checkpoints = directory / "checkpoints"
    (checkpoints / str(STEP)).rename(checkpoints / "44")
    assert "of step 40, not 44" in refused(resume, trainer, directory)
    assert "of step 40, not 44" in refused(find_checkpoint, directory)


def test_checkpoints_of_before_are_read_and_checked(run, capsys):
    trainer, directory = run
    right = resume(trainer, directory)
    for step in (EARLIER, STEP):
        path = directory / "checkpoints" / str(step)
        file = path / "run" / "metadata"
        values = json.loads(file.read_text())
        (path / "metrics").mkdir()
        loss = {"held_out_loss": values["held_out_loss"]}
        (path / "metrics" / "metrics").write_text(json.dumps(loss))
        state = right.state._replace(step=jnp.full_like(right.state.step, step))
        old = {name: values[name] for name in ("config", "corpus")}
        file.write_text(json.dumps(old | {"checksums": digests(state, kind=OLD).arrays}))
    again = resume(trainer, directory)
    assert arrays(again.state) == arrays(right.state)
    assert again.data == right.data
    assert arrays(parameters(directory)) == arrays(right.state.params)
    position = directory / "checkpoints" / str(STEP) / "data" / "metadata"
    with damaged(position, lambda file, _: file.write_text('{"step": 44}')):
        assert "data/metadata" in refused(resume, trainer, directory)
    values = json.loads(file.read_text())
    changed = values | {"checksums": values["checksums"] | {"params.norm.scale": 1}}
    with damaged(file, lambda file, _: file.write_text(json.dumps(changed))):
        assert "params.norm.scale" in refused(parameters, directory)
        assert "params.norm.scale" in refused(resume, trainer, directory)
    renamed = {name.replace("checksums", "checksumr"): x for name, x in values.items()}
    with damaged(file, lambda file, _: file.write_text(json.dumps(renamed))):
        assert "no record of a checkpoint" in refused(parameters, directory)
    # metrics of an earlier one decide what is kept, and no more
    metrics = directory / "checkpoints" / str(EARLIER) / "metrics" / "metrics"
    for text in ("", "{", '{"held_out_loss": "low"}', "[" * 10**5):
        metrics.write_text(text)
        capsys.readouterr()
        assert arrays(resume(trainer, directory).state) == arrays(right.state)
        out = capsys.readouterr().out
        assert f"checkpoint of step {EARLIER}" in out
        assert "does not count as the best" in out


def test_a_converted_model_of_before_has_no_digests(written, tmp_path):
    trainer, _ = written
    params = by_layer(trainer.initial_state().params)
    saved_model.save_model(tmp_path / "model", trainer.config.model, params)
    file = tmp_path / "model" / "checkpoints" / "0" / "run" / "metadata"
    values = json.loads(file.read_text())
    assert values["arrays"]["digests"].keys() == digests({"params": params}).arrays.keys()
    file.write_text(json.dumps({"config": values["config"], "corpus": None}))
    assert find_checkpoint(tmp_path / "model").digests is None
    assert arrays(parameters(tmp_path / "model")) == arrays(params)
    assert resume(trainer, tmp_path / "model").data is None


def test_the_best_is_kept_across_a_resume(run):
    trainer, directory = run
    config = dataclasses.replace(trainer.config, output_dir=str(directory), keep_checkpoints=1)
    state = resume(trainer, directory).state
    for step, loss in ((41, 2.5), (42, float("nan")), (43, None)):
        with Checkpoints(config) as checkpoints:
            state = state._replace(step=jnp.full_like(state.step, step))
            position = {"step": step}
            checkpoints.save(
                state, data=position, corpus=trainer.data.fingerprint, held_out_loss=loss
            )
        assert complete_steps(directory / "checkpoints") == [EARLIER, step]


def test_names_that_are_no_steps_are_left_alone(run):
    trainer, directory = run
    checkpoints = directory / "checkpoints"
    odd = ["²", "٤٢", "007", "4٢", "5.tmp", "-1", "4_1", " 50"]
    for name in odd:
        (checkpoints / name).mkdir()
    (checkpoints / "77").write_text("a file")
    assert complete_steps(checkpoints) == [EARLIER, STEP]
    assert find_checkpoint(directory).step == STEP
    assert int(resume(trainer, directory).state.step) == STEP
    state = resume(trainer, directory).state._replace(step=jnp.full((), 50, jnp.int32))
    config = dataclasses.replace(trainer.config, output_dir=str(directory))
    with Checkpoints(config) as saving:
        saving.save(state, data={"step": 50}, corpus=trainer.data.fingerprint, held_out_loss=None)
    assert complete_steps(checkpoints) == [EARLIER, STEP, 50]
    assert {path.name for path in checkpoints.iterdir()} == {*odd, "77", "30", "40", "50"}
    (checkpoints / "60").mkdir()  # looks like one
    assert "run/metadata is missing" in refused(find_checkpoint, directory)
    assert "--resume-step 50" in refused(resume, trainer, directory)

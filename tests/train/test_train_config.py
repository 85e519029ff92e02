import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from mdn_jax import MDNConfig
from mdn_jax.models import AttentionConfig
from train.checkpointing.resume import resume_conflicts
from train.cli.train import parse
from train.config import TrainConfig, from_dict, to_dict
from train.config_sections import DataConfig, DistributedConfig, OptimizerConfig
from train.options import Option, flatten, option, option_of, options
from train.parallel import distributed


def test_json_round_trip():
    attention = AttentionConfig(layers=(1, 3), num_heads=8)
    config = TrainConfig(
        model=MDNConfig(num_hidden_layers=4, attn=attention),
        data=DataConfig(files=("a", "b/**")),
        optimizer=OptimizerConfig(decay_steps=5000),
        steps=6000,
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("model", "hidden"), "hidden: unknown key"),
        (("data", "file"), r"data\.file: expected one of.*unknown key"),
        (("optimizer", "lr"), r"optimizer\.lr: expected one of.*unknown key"),
        (("stepz",), "stepz: expected one of.*unknown key"),
    ],
)
def test_an_unknown_key_is_named(path, message):
    values = to_dict(TrainConfig())
    part = values
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = 1
    with pytest.raises(ValueError, match=message):
        from_dict(values)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(steps=0), "steps: expected an int >= 1, got 0"),
        (lambda: TrainConfig(batch_size=6, accumulation=4), "accumulation: expected a divisor of"),
        (
            lambda: TrainConfig(steps=1024, optimizer=OptimizerConfig(warmup_steps=1024)),
            r"optimizer\.warmup_steps: expected below the 1024 steps",
        ),
        (lambda: TrainConfig(sample_temperature=float("nan")), "sample_temperature: expected"),
        (lambda: TrainConfig(name="a/b"), "name: expected"),
        (lambda: DataConfig(prefetch=0), r"data\.prefetch: expected an int >= 1, got 0"),
        (lambda: DataConfig(subset="en"), r"data\.subset: expected None without data\.dataset"),
        (
            lambda: DataConfig(prompt="a", messages="b"),
            r"data\.prompt: expected None with data\.messages, got 'a'",
        ),
        (lambda: DataConfig(held_out_fraction=1.0), r"data\.held_out_fraction: .* got 1\.0"),
        (lambda: OptimizerConfig(learning_rate=0.0), r"optimizer\.learning_rate: .*> 0, got 0\.0"),
        (lambda: OptimizerConfig(beta2=1.0), r"optimizer\.beta2: expected .* below 1, got 1\.0"),
    ],
)
def test_a_bad_value_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_resolving_fills_in_what_depends_on_other_fields():
    config = TrainConfig(name="x", steps=2000).resolved()
    assert config.optimizer.decay_steps == 2000
    assert config.output_dir == str(config.directory)
    assert config.directory.parts[-2:] == ("runs", "x")
    assert config.resolved() == config


def test_resume_names_the_fields_that_differ():
    saved = TrainConfig(steps=2000).resolved()
    changed = dataclasses.replace(
        saved,
        steps=3000,
        log_every=1,
        resume=True,
        seed=1,
        optimizer=OptimizerConfig(learning_rate=1.0, decay_steps=2000),
    )
    assert resume_conflicts(to_dict(saved), to_dict(changed)) == [
        "optimizer.learning_rate: the checkpoint has 0.0003, this run 1.0",
        "seed: the checkpoint has 42, this run 1",
    ]


def test_a_field_that_is_newer_than_a_checkpoint_had_its_default():
    saved = to_dict(TrainConfig().resolved())
    del saved["data"]["shuffle_buffer"]
    assert resume_conflicts(saved, to_dict(TrainConfig().resolved())) == []
    changed = TrainConfig(data=DataConfig(shuffle_buffer=3)).resolved()
    assert resume_conflicts(saved, to_dict(changed)) == [
        "data.shuffle_buffer: the checkpoint has 10000, this run 3"
    ]


def test_flags_of_before_the_one_bound_resume():
    saved = to_dict(TrainConfig().resolved())
    saved["model"]["bound_beta"] = False
    for bound, conflicts in (("alpha", []), ("stable", ["model.bound"])):
        current = to_dict(TrainConfig(model=MDNConfig(bound=bound)).resolved())
        found = resume_conflicts(saved, current)
        assert [line.partition(":")[0] for line in found if "bound" in line] == conflicts


def test_more_steps_without_the_old_schedule_are_a_conflict():
    saved, longer = (to_dict(TrainConfig(steps=steps).resolved()) for steps in (2000, 3000))
    assert resume_conflicts(saved, longer) == [
        "optimizer.decay_steps: the checkpoint has 2000, this run 3000"
    ]


CHANGEABLE = {
    *("name", "output_dir", "resume", "resume_step", "profile", "steps", "implementation", "remat"),
    *(
        "autotune",
        "scan_layers",
        "fit_vocab_size",
        "init_from",
        "data.standard_library",
        "data.sources",
    ),
    "data.chat_template",
    *("guard.action", "guard.loss_deviations", "guard.grad_norm_factor"),
    *("guard.window", "guard.patience"),
    *("report.tensorboard", "report.wandb", "report.wandb_project"),
    *("mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor"),
    *("distributed.enabled", "distributed.coordinator"),
    *("distributed.processes", "distributed.index"),
    *("data.files", "data.tokenizer", "data.prefetch", "data.verify"),
    *("log_every", "stability_every", "eval_every", "checkpoint_every", "keep_checkpoints"),
    *("sample_tokens", "sample_prompt", "sample_temperature"),
}
OF_A_PROCESS = {
    *("distributed.coordinator", "distributed.index"),
    "data.chat_template",
    *("init_from", "data.files", "data.sources", "data.tokenizer", "data.prefetch", "data.verify"),
}
FLAGS = flatten(to_dict(TrainConfig()))


def test_every_flag_says_what_a_resumed_run_and_a_process_may():
    declared = options(TrainConfig)
    assert {name for name in FLAGS if option_of(name, declared) is None} == set()
    assert {name for name, x in declared.items() if x.resume == "may change"} == CHANGEABLE
    assert {name for name, x in declared.items() if x.processes == "own"} == OF_A_PROCESS
    assert declared["model"] == Option("fixed")


def test_processes_compare_what_is_not_their_own(monkeypatch):
    compared = {}
    monkeypatch.setattr(distributed, "check_alike", lambda what, values: compared.update(values))
    distributed.check_configuration(TrainConfig())
    assert compared.keys() - {"devices"} == FLAGS.keys() - OF_A_PROCESS


@pytest.mark.parametrize("name", FLAGS)
def test_resume_does_what_the_field_says(name):
    changed = json.loads(json.dumps(to_dict(TrainConfig())))
    *sections, last = name.split(".")
    part = changed
    for section in sections:
        part = part[section]
    part[last] = "another"
    conflicts = resume_conflicts(to_dict(TrainConfig()), changed)
    expected = [] if name in CHANGEABLE else [name]
    assert [conflict.partition(":")[0] for conflict in conflicts] == expected


def test_what_a_checkpoint_has_and_no_field_is_a_conflict():
    saved = to_dict(TrainConfig())
    conflicts = resume_conflicts(saved | {"gone": {"a": 1}}, saved)
    assert conflicts == ["gone.a: the checkpoint has 1, this run None"]


def test_a_field_without_metadata_is_named():
    @dataclass(frozen=True)
    class Bare:
        width: int = 3

    @dataclass(frozen=True)
    class Whole:
        steps: int = option(1, resume="fixed")
        bare: Bare = dataclasses.field(default_factory=Bare)

    with pytest.raises(TypeError, match=r"bare\.width: expected a field made by option\(\)"):
        options(Whole)


def test_a_section_that_is_not_there_has_its_defaults():
    values = to_dict(TrainConfig(steps=2000))
    for section in ("guard", "report", "mesh", "distributed"):
        del values[section]
    assert from_dict(values) == TrainConfig(steps=2000)
    with pytest.raises(ValueError, match="data: expected a JSON object, got 3"):
        from_dict(values | {"data": 3})


def test_the_configuration_needs_no_command_line():
    code = "import sys, train.config; print(*{'tyro', 'tqdm'} & sys.modules.keys())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.split() == []


@pytest.mark.parametrize(
    ("flags", "enabled"),
    [([], False), (["--distributed"], True), (["--no-distributed"], False)],
)
def test_the_name_of_the_section_is_the_flag_of_several_processes(flags, enabled):
    assert parse(["smoke", *flags]).distributed == DistributedConfig(enabled=enabled)

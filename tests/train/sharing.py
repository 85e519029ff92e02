"""Runs of one model and one step share what is traced and compiled of them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import train.model_and_step
from train.config import TrainConfig
from train.model_and_step import ModelAndStep

# what a run does with its step; the step, and where its state lies, know nothing of it
_AROUND_THE_STEP = frozenset(
    {"name", "output_dir", "resume", "resume_step", "init_from", "data", "distributed", "report"}
    | {"profile", "steps", "eval_rows", "log_every", "eval_every", "checkpoint_every"}
    | {"keep_checkpoints", "stability_every"}
    | {"sample_tokens", "sample_prompt", "sample_temperature"}
)


def _key(config: TrainConfig, devices: Any) -> str:
    step = {name: x for name, x in vars(config).items() if name not in _AROUND_THE_STEP}
    return repr((step, config.decay_steps, devices))


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
    """Within it, the second run of a step neither traces nor compiles it again.

    Nor does it draw the first parameters again. `tests.train.cli.test_train` resumes in
    another process, where nothing is shared.
    """
    built: dict[str, dict[str, Any]] = {}
    drawn: dict[str, Any] = {}
    build, draw = ModelAndStep.__init__, train.model_and_step.initial_params

    def shared_build(self: ModelAndStep, config: TrainConfig, *, devices: Any = None) -> None:
        key = _key(config, devices)
        if key not in built:
            build(self, config, devices=devices)
            built[key] = dict(vars(self))
        vars(self).update(built[key], config=config)

    def shared_draw(config: Any, *, seed: int, like: Any) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, like)
        key = repr((config, seed, shardings))
        if key not in drawn:
            drawn[key] = jax.tree.map(np.array, draw(config, seed=seed, like=like))
        return jax.device_put(drawn[key], shardings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelAndStep, "__init__", shared_build)
        patch.setattr(train.model_and_step, "initial_params", shared_draw)
        yield

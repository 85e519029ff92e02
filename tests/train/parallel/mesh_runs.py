"""The same steps on several meshes or in several processes; prints what came of them as JSON.

A program of its own, for the number of devices is fixed when JAX starts:

    python -m tests.train.parallel.mesh_runs CORPUS OUTPUT              sixteen simulated devices
    python -m tests.train.parallel.mesh_runs CORPUS OUTPUT PORT INDEX   one of two processes

Meshes are written data x fsdp x context x tensor.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    count = 16 if len(sys.argv) == 3 else 1
    os.environ["XLA_FLAGS"] = (
        f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={count}"
    )

import jax
import numpy as np

from benchmarks.collectives import collectives as of_program
from mdn_jax import MDNConfig
from mdn_jax.saved.digest import NEW, _on_devices, digests
from tests.tiny import TINY_MODEL
from tests.train.helpers import random_batch, tiny_config
from train.checkpointing.checkpoints import Checkpoints
from train.config import TrainConfig
from train.config_sections import DistributedConfig, MeshConfig
from train.parallel.distributed import several
from train.parallel.sharding import AXES, from_local
from train.run import Run

STEPS, HALF = 20, 10
ONE = "1x1x1x1"
MESHES = {
    **{ONE: 1, "8x1x1x1": 8, "1x8x1x1": 8},
    **{"1x1x2x1": 2, "2x1x4x1": 8, "2x2x2x2": 16},
}
EVERY = "2x2x2x2"  # along every axis
MOVES = (
    *(("8x1x1x1", EVERY), (EVERY, "1x8x1x1"), ("1x8x1x1", ONE), (ONE, "1x1x2x1")),
    *(("1x1x2x1", "2x1x4x1"), ("2x1x4x1", EVERY), (EVERY, ONE)),
    ("1x1x2x1", "1x1x2x1"),
)
# rows for eight devices in two micro-batches, two heads for the axis `tensor`
SHAPE = {"batch_size": 16, "accumulation": 2, "steps": STEPS}
AT_ONCE = "1x1x2x1"  # its batch is one micro-batch


def on_mesh(mesh: str, corpus: Path, output: Path) -> TrainConfig:
    sizes = MeshConfig(**dict(zip(AXES, map(int, mesh.split("x")), strict=True)))
    model = MDNConfig(**TINY_MODEL | {"num_heads": 2})
    shape = SHAPE | ({"accumulation": 1} if mesh == AT_ONCE else {})
    config = tiny_config(corpus, output, mesh=sizes, **shape)
    return dataclasses.replace(config, model=model)


def batch(trainer, seed, **changes):
    """A batch on the devices, from the rows that this process brings."""
    config = trainer.config
    rows = trainer.share.rows(config.batch_size)
    values = random_batch(seed, config.batch_size, config.sequence_length)
    for name, value in changes.items():
        values[name][3, 5] = value
    return from_local(trainer.mesh, {name: x[rows] for name, x in values.items()})


def take_steps(trainer, state, steps):
    losses = []
    for step in steps:
        state, metrics = trainer.train_step(state, batch(trainer, step % 4))
        losses.append(float(metrics.loss))
    return state, losses


def parts(tree):
    """What every device holds of every array."""
    return [[np.asarray(s.data) for s in x.addressable_shards] for x in jax.tree.leaves(tree)]


def refused_everywhere(trainer, state):
    """Whether a row that is not finite, on one device, leaves every device's part as it was."""
    before = parts((state.params, state.opt_state))
    bad = batch(trainer, 9, tokens=999)  # outside of the vocabulary: nan
    state, metrics = trainer.train_step(state, bad)
    counts = {int(np.asarray(s.data)) for s in state.skipped.addressable_shards}
    after = parts((state.params, state.opt_state))
    same = jax.tree.all(jax.tree.map(np.array_equal, before, after))
    return same and counts == {1} and not np.isfinite(metrics.loss)


def collectives(text):
    """Of a compiled program: how many there are of each kind, in its loops and outside of them.

    Sums of gradients, which are arrays, are counted apart from those of scalars.
    """
    counts = {"loop": {}, "outside": {}}
    for found in of_program(text):
        where, kind = counts["loop" if found.in_loop else "outside"], found.kind
        if kind == "all-reduce":
            kind = "sum of scalars" if found.scalar else "sum of arrays"
        where[kind] = where.get(kind, 0) + 1
    counts["branches"] = text.count(" conditional(")
    return counts


def same_digests(arrays):
    """Whether arrays that are cut have, where they are computed, the digests of whole ones."""
    cut = {x.shape: x for x in jax.tree.leaves(arrays) if not x.is_fully_replicated}
    assert cut
    whole = digests([np.asarray(x) for x in cut.values()]).arrays.values()
    return [int(_on_devices(x, NEW)) for x in cut.values()] == [*whole]


def half_and_half(config, devices=None, state=None):
    """A trainer, its losses and whether it refuses; leaves a checkpoint after half of the steps.

    Args:
      config: of the run.
      devices: of its mesh; all if None.
      state: to begin with, on the host; its own if None.
    """
    trainer = Run(config, devices=devices)
    if state is None:
        state = trainer.initial_state()
    else:
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, trainer.like))
    with jax.set_mesh(trainer.mesh):
        trainer.train_step = trainer.step.lower(state, batch(trainer, 0)).compile()
    state, first = take_steps(trainer, state, range(HALF))
    with Checkpoints(config) as checkpoints:
        checkpoints.save(state, data={"step": HALF}, corpus="", held_out_loss=None)
    state, second = take_steps(trainer, state, range(HALF, STEPS))
    return trainer, first + second, refused_everywhere(trainer, state)


def second_half(trainer, saved):
    """Losses of the steps after a checkpoint of another run."""
    with Checkpoints(saved) as checkpoints:
        state, *_ = checkpoints.restore(trainer.like, corpus="", begin=trainer.begin)
    lies_right = jax.tree.map(lambda x, y: x.sharding == y.sharding, state, trainer.like)
    assert all(jax.tree.leaves(lies_right))
    return take_steps(trainer, state, range(HALF, STEPS))[1]


def on_meshes(corpus: Path, output: Path) -> dict:
    report = {"losses": {}, "moved": {}, "refused": {}, "collectives": {}}
    trainers = {}
    begin = Run(on_mesh(ONE, corpus, output), devices=jax.devices()[:1]).initial_state()
    begin = jax.tree.map(np.array, begin)
    for mesh, count in MESHES.items():
        config = on_mesh(mesh, corpus, output / mesh)
        state = None if mesh == EVERY else begin  # which makes its own
        devices = jax.devices()[:count]
        trainers[mesh], losses, report["refused"][mesh] = half_and_half(config, devices, state)
        report["losses"][mesh] = losses
        if mesh == EVERY:
            report["digests"] = same_digests(trainers[mesh].initial_state().params)
        report["collectives"][mesh] = collectives(trainers[mesh].train_step.as_text())
    for old, new in MOVES:
        losses = second_half(trainers[new], trainers[old].config)
        report["moved"][f"{old} to {new}"] = losses
    return report


def in_processes(corpus: Path, output: Path, port: str, index: str) -> dict:
    """Rows in two processes, from a checkpoint of many devices; then the tokens of rows."""
    address = f"localhost:{port}"
    with several(DistributedConfig(coordinator=address, processes=2, index=int(index))):
        trainer, losses, refused = half_and_half(on_mesh("2x1x1x1", corpus, output / "processes"))
        moved = second_half(trainer, on_mesh("8x1x1x1", corpus, output / "8x1x1x1"))
        stretches = Run(on_mesh("1x1x2x1", corpus, output / "stretches"))
        assert stretches.share == (0, 1)  # both bring whole rows
        across = second_half(stretches, trainer.config)
    return {"losses": losses, "moved": moved, "refused": refused, "across": across}


def main(corpus: str, output: str, *process: str) -> None:
    run = in_processes if process else on_meshes
    print(json.dumps(run(Path(corpus), Path(output), *process)))


if __name__ == "__main__":
    main(*sys.argv[1:])

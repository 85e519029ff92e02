"""What the guard on gates and states (`train.metrics.stability`) costs beside a training step."""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Annotated

import jax
import tyro


@dataclass(frozen=True)
class GuardConfig:
    """Times a training step and the guard of a named configuration, in turn."""

    name: str = "smoke"
    """Of the configuration."""
    every: int = 10
    """Steps between measurements (`stability_every`)."""
    runs: int = 20
    """Times each; the medians count."""
    limit: float = 0.02
    """Largest share of the steps' time."""


def guard(config: Annotated[GuardConfig, tyro.conf.arg(name="")]) -> None:
    """Prints the guard's share of the steps' time; fails above the limit."""
    # not in the extra `benchmarks`: packages that only training needs
    from configs import CONFIGS
    from train.config_sections import DataConfig
    from train.run import Run
    from train.stacking import by_layer

    if config.name not in CONFIGS:
        raise SystemExit(f"name: expected one of {', '.join(CONFIGS)}, got {config.name}")
    base = CONFIGS[config.name]()
    run = Run(dataclasses.replace(base, data=DataConfig(standard_library=True)).resolved())
    state = run.initial_state()
    steps, guards = [], []
    with run.data.batches(run.share) as batches:
        for _ in range(config.runs + 1):
            batch = run.place(next(batches))
            began = time.perf_counter()
            state, metrics = run.train_step(state, batch)
            jax.block_until_ready(metrics)
            between = time.perf_counter()
            jax.device_get(run.stability(by_layer(state.params), batch))
            steps.append(between - began)
            guards.append(time.perf_counter() - between)
    step, measured = (statistics.median(x[1:]) for x in (steps, guards))  # without compiling
    share = measured / config.every / step
    print(
        f"{config.name} on {jax.devices()[0].device_kind}: step {1e3 * step:.1f} ms, guard "
        f"{1e3 * measured:.1f} ms; every {config.every} steps {share:.2%} of the steps' time"
    )
    if share > config.limit:
        raise SystemExit(f"above the limit of {config.limit:.0%}")

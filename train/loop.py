"""A training run, from its start or its last checkpoint to the sample at its end."""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax

from mdn_jax.cli.interrupt import Interrupt
from mdn_jax.errors import RunError
from mdn_jax.new_file import write_text
from mdn_jax.saved.digest import file_digest
from mdn_jax.text.chat import TEMPLATE_FILE
from mdn_jax.text.text import text_of
from mdn_jax.text.vocabulary import TOKENIZER_FILE
from train.checkpointing.checkpoints import Checkpoints, has_checkpoint
from train.checkpointing.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    PLOT_FILE,
    SAMPLE_FILE,
    config_int,
    only_run,
    read_config,
    way_on,
)
from train.config import TrainConfig, to_dict
from train.data.batches import Batches
from train.data.sources import find_source
from train.evaluation.sample import sample
from train.guard import DivergedError
from train.metrics.log import MetricsLog, Progress
from train.metrics.loss_curve import plot_losses
from train.metrics.steps import StepReports
from train.metrics.utilization import Monitor
from train.metrics.writers import check_packages, make_writers
from train.optimizer import average_of
from train.origin import (
    begin_with,
    check_origin_alike,
    check_origin_tokenizer,
    find_origin,
    origin_params,
)
from train.parallel.distributed import Agreement, check_configuration, is_first, together
from train.parallel.sharding import on_mesh
from train.run import Run, fit_vocabulary
from train.stacking import by_layer
from train.step import TrainState


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      state: the last training state, by layer.
      unigram_entropy: of the held-out tokens, nats/token.
      held_out_loss: on the same tokens, nats/token; None if a signal ended the run.
      signal: number of the signal that ended the run before its last step, or None.
      unit: of both, in words: a token may be a byte.
      bytes_per_token: of the held-out documents.
    """

    state: TrainState
    unigram_entropy: float
    held_out_loss: float | None
    signal: int | None = None
    unit: str = "nats/byte"
    bytes_per_token: float = 1.0


def train(
    config: TrainConfig,
    *,
    devices: Sequence[jax.Device] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Runs the training that a configuration describes.

    With several processes (`jax.distributed`) each makes the same call, and the first writes. From
    the first look at the directory to the end no other run can use it.

    Args:
      config: the run. Its directory gets the configuration, checkpoints, metrics, plot and sample.
      devices: to run on; None: all of all processes.
      stop: asked after every step; True ends the run as SIGTERM does, with a checkpoint.

    Returns:
      The state at the end and the losses.

    Raises:
      RunError: something that the user can put right; nothing was overwritten.
    """
    check_packages(config)
    with only_run(config.directory) if is_first() else contextlib.nullcontext():
        return _train(config, devices, stop)


def _train(
    config: TrainConfig, devices: Sequence[jax.Device] | None, stop: Callable[[], bool]
) -> Result:
    _check_directory(config)
    config = _with_saved_schedule(config).resolved()
    check_configuration(config)
    directory = config.directory
    origin = None
    if config.init_from is not None and not config.resume:
        origin = find_origin(config.init_from)
        check_origin_alike(origin)
        config = begin_with(config, origin)
    source = find_source(config.data)
    if origin is not None:
        check_origin_tokenizer(origin, source.tokenizer)
    config = fit_vocabulary(config, source.tokenizer)
    run = Run(config, source=source, devices=devices)
    run.check_alike()
    print(run.describe(), flush=True)
    with Checkpoints(config) as checkpoints, together():
        position, known = None, None
        if origin is not None:
            state = run.begin(origin_params(origin, run.like_params))
            print(f"begins with the parameters in {origin.path}", flush=True)
        elif not config.resume:
            state = run.initial_state()
        else:
            state, position, known = checkpoints.restore(
                run.like, corpus=run.data.fingerprint, begin=run.begin
            )
            print(f"resumed after step {int(state.step)} of {config.steps}", flush=True)
            if int(state.step) >= config.steps:
                print(f"no steps left; to train on, add for example --steps {2 * config.steps}")
        batches = run.data.batches(run.share, position)
        if is_first():
            # another version of the library would write it differently
            if known is None or file_digest(directory / TOKENIZER_FILE) != known:
                run.data.tokenizer.save(directory)
            if run.data.chat_template is not None:
                write_text(directory / TEMPLATE_FILE, run.data.chat_template)
            write_text(directory / CONFIG_FILE, json.dumps(to_dict(config), indent=2) + "\n")
        path = directory / METRICS_FILE
        done = int(state.step)
        others = partial(make_writers, config, resume_step=done)
        log = MetricsLog(path, resume_step=done, writes=is_first(), others=others)
        with batches, log:
            try:
                with Interrupt() as interrupt:
                    if origin is not None:
                        _evaluate(run, state, log, print)
                    result = _run_steps(run, state, batches, checkpoints, log, interrupt, stop)
            except DivergedError as error:
                checkpoints.wait()
                raise DivergedError(f"{error}; {way_on(directory)}", step=error.step) from None
            _save(run, batches, checkpoints, result.state, result.held_out_loss)
            checkpoints.wait()
            if result.signal is None:
                _finish(run, result, log)
    return dataclasses.replace(result, state=by_layer(result.state))


def _check_directory(config: TrainConfig) -> None:
    directory, there = config.directory, has_checkpoint(config.directory)
    if there and not config.resume:
        raise RunError(
            f"output_dir: expected a directory without a run, got {directory}, which holds "
            "checkpoints; continue that run with --resume or choose another --output-dir"
        )
    if config.resume and not there:
        raise RunError(
            f"resume: expected a checkpoint in {directory}, found none; "
            "name the run's directory with --output-dir, or start it without --resume"
        )


def _with_saved_schedule(config: TrainConfig) -> TrainConfig:
    """A resumed run keeps its schedule when only its number of steps changes."""
    directory = config.directory
    known = config.optimizer.decay_steps is not None
    if not config.resume or known or not (directory / CONFIG_FILE).exists():
        return config
    decay_steps = config_int(directory, read_config(directory), "optimizer.decay_steps")
    optimizer = dataclasses.replace(config.optimizer, decay_steps=decay_steps)
    return dataclasses.replace(config, optimizer=optimizer)


def _save(
    run: Run,
    batches: Batches,
    checkpoints: Checkpoints,
    state: TrainState,
    held_out_loss: float | None,
) -> None:
    checkpoints.save(
        state,
        data=batches.position(),
        corpus=run.data.fingerprint,
        held_out_loss=held_out_loss,
    )


def _run_steps(
    run: Run,
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpoints,
    log: MetricsLog,
    interrupt: Interrupt,
    stop: Callable[[], bool],
) -> Result:
    """Steps until the last one or a signal, with metrics, checkpoints and evaluations.

    The first line of metrics is that of the first step: its speed includes the compilation.
    """
    config = run.config
    start, last = int(state.step), config.steps
    held_out = None
    agreed = Agreement()  # processes stop after the same step
    result = partial(
        Result,
        unigram_entropy=run.unigram,
        unit=run.data.unit,
        bytes_per_token=run.data.bytes_per_token,
    )
    monitor = Monitor(
        config, run.like_params, list(run.mesh.devices.flat), start=start, traces=is_first()
    )
    with monitor, Progress(start=start, steps=last, shown=is_first()) as progress:
        reports = StepReports(
            config,
            batches=batches,
            epochs=run.data.epochs,
            monitor=monitor,
            log=log,
            progress=progress,
        )
        for step in range(start + 1, last + 1):
            reports.before(step)
            batch = run.place(next(batches))
            state, metrics = run.train_step(state, batch)
            logged = step % config.log_every == 0 or step in (start + 1, last)
            reports.add(step, metrics, logged=logged)
            measures = config.stability_every and step % config.stability_every == 0
            evaluates = step % config.eval_every == 0 or step == last
            saves = step % config.checkpoint_every == 0 or step == last
            held_out = None
            if measures or evaluates or saves:
                reports.finish()
                if measures:
                    measured = jax.device_get(run.stability(by_layer(state.params), batch))
                    log.write(step=step, **{name: x.item() for name, x in measured.items()})
                if evaluates:
                    held_out = _evaluate(run, state, log, progress.say)
                if saves:
                    _save(run, batches, checkpoints, state, held_out)
                reports.go_on()
            ends = agreed(interrupt.signal or (signal.SIGTERM if stop() else 0))
            if ends and step < last:
                reports.finish()
                return result(state, held_out_loss=None, signal=ends)
    if held_out is None:  # resumed after the last step
        held_out = run.evaluate(by_layer(state.params)).mean
    return result(state, held_out_loss=held_out)


def _evaluate(run: Run, state: TrainState, log: MetricsLog, say: Callable[[str], None]) -> float:
    """Measures the held-out loss, for the metrics and whoever watches."""
    step = int(state.step)
    held_out, each = run.evaluate(by_layer(state.params))
    per_byte = held_out / run.data.bytes_per_token
    losses = {f"held_out_loss/{name}": loss for name, loss in each.items()}
    average = average_of(state.opt_state)
    if average is not None:
        losses["held_out_loss_ema"] = run.evaluate(by_layer(average)).mean
    log.write(step=step, held_out_loss=held_out, held_out_nats_per_byte=per_byte, **losses)
    say(f"step {step}: held-out loss {held_out:.4f} {run.data.unit}")
    return held_out


def _finish(run: Run, result: Result, log: MetricsLog) -> None:
    """Draws the curve, writes and prints the sample."""
    config, directory = run.config, run.config.directory
    text = None
    if config.sample_tokens:
        try:
            text = on_mesh(run.mesh, sample)(
                run.model,
                by_layer(result.state.params),
                prompt=config.sample_prompt,
                length=config.sample_tokens,
                temperature=config.sample_temperature,
                seed=config.seed,
                text=text_of(run.data.tokenizer),
            )
        except RunError as error:  # of a model that diverged; the run itself is done
            print(f"no sample: {error}", flush=True)
    if not is_first():  # all of them had to compute
        return
    plot_losses(
        log.records,
        unigram=result.unigram_entropy,
        title=config.name,
        path=directory / PLOT_FILE,
        unit=result.unit,
    )
    if text is not None:
        write_text(directory / SAMPLE_FILE, text)
        print(f"sample at temperature {config.sample_temperature}:\n{text}\n{'-' * 80}", flush=True)

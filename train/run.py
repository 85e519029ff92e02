"""What a run computes with: its model and step, its documents, its compiled functions."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mdn_jax import MDNForCausalLM
from mdn_jax.errors import RunError
from mdn_jax.layers.sharding import FSDP, TENSOR
from mdn_jax.models.sizes import check_fits
from mdn_jax.saved.model import DIRECTORY, complete_steps
from mdn_jax.text.text import text_of
from mdn_jax.text.tokenizer import BYTES, TOKENIZER_FILE, FileTokenizer, Tokenizer
from train.checkpointing.run_directory import CONFIG_FILE
from train.config import TrainConfig
from train.data.batches import find_source, load_data
from train.data.packing import Batch, unigram_entropy
from train.evaluation.held_out import make_evaluate
from train.initialize import abstract_state, initial_params, place_state
from train.metrics.stability import make_stability
from train.optimizer import Params, make_optimizer, make_schedule
from train.parallel.distributed import check_alike
from train.parallel.sharding import (
    batch_sharding,
    check_divisible,
    from_global,
    from_local,
    make_mesh,
    on_mesh,
    process_share,
    replicated,
)
from train.step import TrainState, make_train_step, split_model

# float32 parameters and the two moments of AdamW
_STATE_BYTES = 12


class ModelAndStep:
    """The model and the step of one resolved configuration.

    Attributes:
      config: the configuration.
      mesh: of the devices.
      schedule: of the learning rate.
      optimizer: update rule.
      model: shapes, without arrays.
      loss: of parameters and a batch, summed over targets.
      like: shapes and shardings of the training state.
      step: compiled at its first call, which the mesh has to be ambient for.
    """

    def __init__(self, config: TrainConfig, *, devices: Sequence[jax.Device] | None = None) -> None:
        """Builds the functions; nothing is compiled yet.

        Args:
          config: resolved configuration.
          devices: to run on; None: all of all processes.

        Raises:
          RunError: a mesh that does not fit, or a model that no device can hold.
        """
        self.config = config
        self.schedule = make_schedule(config.optimizer, config.decay_steps)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.mesh = make_mesh(config.mesh, devices)
        _check_size(config, self.mesh)
        self.model = nnx.eval_shape(
            lambda: MDNForCausalLM(
                config.model,
                implementation=config.implementation,
                remat=config.remat,
                dtype=jnp.dtype(config.dtype),
                rngs=nnx.Rngs(0),
            )
        )
        self.loss, params = split_model(self.model)
        check_divisible(config, self.mesh, params)
        self.like = abstract_state(params, self.optimizer, self.mesh)
        self.step = make_train_step(
            self.loss,
            self.optimizer,
            self.schedule,
            guard=config.guard,
            accumulation=config.accumulation,
            dtype=jnp.dtype(config.dtype),
            state_sharding=jax.tree.map(lambda x: x.sharding, self.like),
            batch_sharding=batch_sharding(self.mesh),
            metrics_sharding=replicated(self.mesh),
        )

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        config = self.config
        return self.begin(initial_params(config.model, seed=config.seed, like=self.like.params))

    def begin(self, params: Params) -> TrainState:
        """The state before the first step with these parameters, whose buffers it takes over."""
        return place_state(params, self.optimizer, self.like)


class Run(ModelAndStep):
    """The documents, the model and the compiled functions of one resolved configuration."""

    def __init__(self, config: TrainConfig, *, devices: Sequence[jax.Device] | None = None) -> None:
        """Reads the documents and builds the model's functions.

        Args:
          config: resolved configuration.
          devices: to run on; None: all of all processes.

        Raises:
          RunError: a corpus that cannot be used, a tokenizer that does not fit the run, or a mesh
            that does not fit.
        """
        super().__init__(config, devices=devices)  # what cannot run is said before data is read
        source = find_source(config.data)
        check_tokenizer(config, source.tokenizer)
        self.data = load_data(config, source)
        self.unigram = unigram_entropy(self.data.held_out)
        self.share = process_share(self.mesh)
        evaluate = make_evaluate(
            self.loss, self.data.held_out, place=partial(from_global, self.mesh)
        )
        self.train_step = on_mesh(self.mesh, self.step)
        self.evaluate = on_mesh(self.mesh, evaluate)
        self.stability = on_mesh(self.mesh, make_stability(self.model))

    def check_alike(self) -> None:
        """Raises, in every process, unless all have the same documents and checkpoints.

        Raises:
          RunError: names what differs, and in which process.
        """
        data = self.config.data
        documents = "data.files" if data.dataset is None else "data.dataset"
        check_alike(
            "documents, tokenizer and checkpoints",
            {
                documents: f"digest {self.data.fingerprint[:12]}",
                "data.tokenizer": f"digest {self.data.tokenizer.fingerprint[:12]}",
                "output_dir": f"steps {complete_steps(self.config.directory / DIRECTORY)}",
            },
        )

    def place(self, batch: Batch) -> Batch:
        """A batch on the devices, from each process's rows."""
        return from_local(self.mesh, batch)

    def describe(self) -> str:
        """One line on the size of the run."""
        parameters = sum(x.size for x in jax.tree.leaves(self.like.params))
        devices = self.mesh.devices
        return (
            f"{parameters:,} parameters, {self.data.size}, "
            f"{self.config.tokens_per_step:,} tokens a step, on {devices.size} x "
            f"{devices.flat[0].device_kind} in {jax.process_count()} process(es)"
        )


def check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises unless the model, the sample and the run to resume can have these tokens.

    Args:
      config: resolved configuration.
      tokenizer: of its documents.

    Raises:
      RunError: names what does not fit.
    """
    if config.model.vocab_size < tokenizer.vocab_size:
        raise RunError(
            f"model.vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {config.model.vocab_size}"
        )
    if config.sample_tokens and not text_of(tokenizer).encode(config.sample_prompt):
        raise RunError(
            "sample_prompt: expected text, as no token of the tokenizer opens a document "
            f"(data.start_token names one), got {config.sample_prompt!r}"
        )
    saved = config.directory / TOKENIZER_FILE
    if not config.resume:
        return
    if saved.exists():
        expected = FileTokenizer(saved).fingerprint
    elif (config.directory / CONFIG_FILE).exists():
        expected = BYTES
    else:
        return  # a converted model that nothing is known of
    if tokenizer.fingerprint != expected:
        raise RunError(
            f"data.tokenizer: expected that of the run in {config.directory} "
            f"({'bytes' if expected == BYTES else saved}), got "
            f"{config.data.tokenizer or 'bytes'}, which gives other tokens"
        )


def _check_size(config: TrainConfig, mesh: Mesh) -> None:
    """Before any of it is built."""
    pieces = mesh.shape[FSDP] * mesh.shape[TENSOR]
    try:
        check_fits(
            config.model, bytes_each=_STATE_BYTES, device=jax.local_devices()[0], pieces=pieces
        )
    except ValueError as error:
        raise RunError(str(error)) from None

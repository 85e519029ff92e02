"""The model and the step of a run on its devices: all that needs no documents."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mdn_jax import MDNForCausalLM
from mdn_jax.errors import RunError
from mdn_jax.layers.sharding import CONTEXT, FSDP, TENSOR
from mdn_jax.models.sizes import check_fits
from train.config import TrainConfig
from train.config_sections import Autotune
from train.freezing import frozen_mask, without_frozen
from train.initialize import abstract_state, initial_params, place_state
from train.optimizer import Params, make_optimizer, make_schedule, with_average
from train.parallel.own_tokens import OwnTokens
from train.parallel.sharding import (
    batch_sharding,
    check_context,
    check_divisible,
    make_mesh,
    replicated,
)
from train.scanning import scanned_loss
from train.stacking import by_layer, equal_layers, stacked
from train.step import TrainState, make_train_step, split_model

# float32 parameters and the two moments of AdamW; an average of the parameters
_STATE_BYTES, _AVERAGE_BYTES = 12, 4

_CUBLAS: Mapping[str, bool | int] = {"xla_gpu_enable_triton_gemm": False}
COMPILER_OPTIONS: Mapping[Autotune, Mapping[str, bool | int]] = {
    "all": {},
    "cublas": _CUBLAS,
    "off": {**_CUBLAS, "xla_gpu_autotune_level": 0},
}
"""XLA's options for the step by `TrainConfig.autotune`; what is not there is as in `XLA_FLAGS`."""


class ModelAndStep:
    """The model and the step of one resolved configuration.

    Attributes:
      config: the configuration.
      mesh: of the devices.
      schedule: of the learning rate.
      optimizer: update rule.
      model: shapes, without arrays.
      loss: of parameters by layer and a batch, summed over targets; the mesh has to be ambient.
      frozen: which parameters of the state stay as they are; None: none.
      like: shapes and shardings of the training state, equal layers stacked.
      like_params: those of the parameters by layer.
      step: compiled at its first call, which the mesh has to be ambient for.
    """

    def __init__(self, config: TrainConfig, *, devices: Sequence[jax.Device] | None = None) -> None:
        """Builds the functions; nothing is compiled yet.

        Args:
          config: resolved configuration.
          devices: to run on; None: all of all processes.

        Raises:
          RunError: a mesh that does not fit, a model that no device can hold, patterns of frozen
            parameters that match none or all, or layers to scan over that do not repeat.
        """
        self.config = config
        self.schedule = make_schedule(config.optimizer, config.decay_steps)
        self.mesh = make_mesh(config.mesh, devices)
        check_context(config, self.mesh)
        _check_size(config, self.mesh)
        self.model = nnx.eval_shape(
            lambda: MDNForCausalLM(
                config.model,
                implementation=config.implementation,
                remat=config.remat,
                context_axis=CONTEXT if self.mesh.shape[CONTEXT] > 1 else None,
                dtype=jnp.dtype(config.dtype),
                rngs=nnx.Rngs(0),
            )
        )
        of_tokens, params = split_model(self.model)
        tokens = OwnTokens(self.mesh)
        self.loss = tokens.on_each(lambda *inputs: tokens.together(of_tokens(*inputs)))
        frozen = frozen_mask(params, config.optimizer.frozen)
        groups = equal_layers(params, frozen)
        self.frozen = stacked(frozen, groups, join=lambda marks: marks[0])
        optimizer = make_optimizer(config.optimizer, self.schedule)
        optimizer = without_frozen(optimizer, self.frozen)
        self.optimizer = with_average(optimizer, config.optimizer.ema_decay, self.frozen)
        check_divisible(config, self.mesh, params)
        self.like = abstract_state(params, groups, self.optimizer, self.mesh)
        self.like_params = by_layer(self.like.params)
        self.step = make_train_step(
            scanned_loss(self.model, groups) if config.scan_layers else of_tokens,
            self.optimizer,
            self.schedule,
            of_stacks=config.scan_layers,
            guard=config.guard,
            frozen=self.frozen,
            accumulation=config.accumulation,
            dtype=jnp.dtype(config.dtype),
            tokens=tokens,
            state_sharding=jax.tree.map(lambda x: x.sharding, self.like),
            batch_sharding=batch_sharding(self.mesh),
            metrics_sharding=replicated(self.mesh),
            compiler_options=COMPILER_OPTIONS[config.autotune],
        )

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        config = self.config
        return self.begin(initial_params(config.model, seed=config.seed, like=self.like_params))

    def begin(self, params: Params) -> TrainState:
        """The state before the first step with these parameters by layer, not used again."""
        return place_state(params, self.optimizer, self.like)


def _check_size(config: TrainConfig, mesh: Mesh) -> None:
    """Before any of it is built."""
    pieces = mesh.shape[FSDP] * mesh.shape[TENSOR]
    each = _STATE_BYTES + _AVERAGE_BYTES * (config.optimizer.ema_decay is not None)
    try:
        check_fits(config.model, bytes_each=each, device=jax.local_devices()[0], pieces=pieces)
    except ValueError as error:
        raise RunError(str(error)) from None

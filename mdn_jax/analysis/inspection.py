"""What the gates of a model's heads do on text: statistics of every layer and head."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from mdn_jax import analysis
from mdn_jax.evaluation.token_losses import Row
from mdn_jax.models import MDNForCausalLM

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
GATES = ("alpha", "mu", "beta", "eta")


@dataclass(frozen=True)
class LayerSteps:
    """Every step of one MDN layer, float64, `[rows, T, HV]`; states' norms `[rows, HV]`.

    Attributes:
      log_alpha: log of the decay, nats.
      log_mu: log of the momentum, nats.
      beta: step size.
      eta: write scale.
      erase: erase key times key.
      memory_norm: Frobenius norm of the memory at the end of each row.
      momentum_norm: of the momentum.
    """

    log_alpha: NDArray[np.float64]
    log_mu: NDArray[np.float64]
    beta: NDArray[np.float64]
    eta: NDArray[np.float64]
    erase: NDArray[np.float64]
    memory_norm: NDArray[np.float64]
    momentum_norm: NDArray[np.float64]

    @property
    def gates(self) -> tuple[NDArray[np.float64], ...]:
        """`alpha, mu, beta, eta`."""
        return np.exp(self.log_alpha), np.exp(self.log_mu), self.beta, self.eta


@dataclass(frozen=True)
class HeadReport:
    """Statistics of one head over all steps.

    Attributes:
      layer: index of the layer.
      head: index of the value head.
      alpha: quantiles of the decay, by `QUANTILES`.
      mu: of the momentum.
      beta: of the step size.
      eta: of the write scale.
      spectral_radius: quantiles along the key.
      oscillating: share of steps with complex eigenvalues.
      unstable: share of steps outside of the stable region.
      load: largest `analysis.stability_load`; the region ends at 1.
      period: median steps of an oscillation, over the steps that have one; None: none has.
      memory_half_life: tokens until the decay, by the mean of log alpha, has halved the memory
        where no later key touches it; what the momentum still feeds into it lasts as that does.
      momentum_half_life: tokens until the momentum has halved, by the mean of log mu.
      key_half_life: steps along one key, by the median spectral radius.
      window_growth: largest norm of the product over a window of steps along one key.
      memory_norm: Frobenius norm of the memory at the end of a row, mean.
      momentum_norm: of the momentum.
    """

    layer: int
    head: int
    alpha: tuple[float, ...]
    mu: tuple[float, ...]
    beta: tuple[float, ...]
    eta: tuple[float, ...]
    spectral_radius: tuple[float, ...]
    oscillating: float
    unstable: float
    load: float
    period: float | None
    memory_half_life: float
    momentum_half_life: float
    key_half_life: float
    window_growth: float
    memory_norm: float
    momentum_norm: float


def record_steps(
    model: MDNForCausalLM, rows: Sequence[Row], *, batch_size: int
) -> dict[int, LayerSteps]:
    """The gates of every step of rows of one width.

    Args:
      model: the model.
      rows: all of one width.
      batch_size: rows in one call; the last call is filled up with rows that are not counted.

    Returns:
      The steps of each MDN layer by its index.
    """
    graph, weights = nnx.split(model)
    parts: dict[int, list[tuple[NDArray[Any], ...]]] = {}
    for tokens, documents, count in _batches(rows, batch_size):
        records = _record(graph, weights, tokens, documents)
        for layer, (gates, norms) in jax.device_get(records).items():
            own = tuple(np.asarray(x[:count], np.float64) for x in (*gates, *norms))
            parts.setdefault(layer, []).append(own)
    return {
        layer: LayerSteps(*map(np.concatenate, zip(*pieces, strict=True)))
        for layer, pieces in parts.items()
    }


def _batches(
    rows: Sequence[Row], batch_size: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], int]]:
    for start in range(0, len(rows), batch_size):
        batch = list(rows[start : start + batch_size])
        count = len(batch)
        batch += [batch[-1]] * (batch_size - count)
        tokens = np.stack([row.tokens for row in batch])
        none = np.zeros(tokens.shape[1], np.int32)
        documents = np.stack([none if row.documents is None else row.documents for row in batch])
        yield tokens, documents, count


@partial(jax.jit, static_argnums=0)
def _record(
    graph: Any, weights: Any, tokens: Int[Array, "B T"], documents: Int[Array, "B T"]
) -> dict[int, tuple[tuple[Float[Array, "B T HV"], ...], tuple[Float[Array, "B HV"], ...]]]:
    records, _ = analysis.record_layers(nnx.merge(graph, weights), tokens, documents)
    return {
        layer: ((*x.gates, x.erase), analysis.state_norms(x.state)) for layer, x in records.items()
    }


def report_layer(layer: int, steps: LayerSteps, *, window: int) -> list[HeadReport]:
    """Statistics of a layer's heads.

    Args:
      layer: its index.
      steps: from `record_steps`.
      window: steps of `HeadReport.window_growth`, at most those of a row.
    """
    with jax.enable_x64(True):
        erase = steps.erase
        radius = np.asarray(analysis.spectral_radius(*steps.gates, erase=erase))
        oscillating = np.asarray(analysis.is_oscillating(*steps.gates, erase=erase))
        stable = np.asarray(analysis.is_stable(*steps.gates, erase=erase))
        load = np.asarray(analysis.stability_load(*steps.gates, erase=erase))
        period = np.asarray(analysis.period(*steps.gates, erase=erase))
        matrices = jnp.swapaxes(analysis.transition(*steps.gates, erase=erase), 1, 2)
        window = min(window, erase.shape[1])
        growth = np.asarray(analysis.window_growth(matrices, window)).max((0, 2))
        key = np.asarray(analysis.half_life(np.median(radius, axis=(0, 1))))
    reports = []
    for head in range(radius.shape[-1]):
        periods = period[..., head][oscillating[..., head]]
        reports.append(
            HeadReport(
                layer=layer,
                head=head,
                **{n: _quantiles(x[..., head]) for n, x in zip(GATES, steps.gates, strict=True)},
                spectral_radius=_quantiles(radius[..., head]),
                oscillating=float(oscillating[..., head].mean()),
                unstable=float(1 - stable[..., head].mean()),
                load=float(load[..., head].max()),
                period=float(np.median(periods)) if len(periods) else None,
                memory_half_life=_half_life(steps.log_alpha[..., head]),
                momentum_half_life=_half_life(steps.log_mu[..., head]),
                key_half_life=float(key[head]),
                window_growth=float(growth[head]),
                memory_norm=float(steps.memory_norm[..., head].mean()),
                momentum_norm=float(steps.momentum_norm[..., head].mean()),
            )
        )
    return reports


def to_json(report: HeadReport) -> dict[str, Any]:
    """JSON values: quantiles by name, null for what is not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return {f"{q:.0%}": plain(x) for q, x in zip(QUANTILES, value, strict=True)}
        return value if value is not None and np.isfinite(value) else None

    return {name: plain(value) for name, value in dataclasses.asdict(report).items()}


def _quantiles(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(x) for x in np.quantile(values, QUANTILES))


def _half_life(log_factors: NDArray[np.float64]) -> float:
    """Steps until a product of such factors is a half; inf if it does not fall."""
    mean = float(log_factors.mean())
    return float(np.log(0.5) / mean) if mean < 0 else np.inf

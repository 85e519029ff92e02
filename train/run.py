"""What a run computes with: its documents, its model and its compiled functions."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax

from mdn_jax.errors import RunError
from mdn_jax.saved.model import DIRECTORY, complete_steps
from mdn_jax.text.text import text_of
from mdn_jax.text.tokenizer import BYTES, TOKENIZER_FILE, FileTokenizer, Tokenizer
from train.checkpointing.run_directory import CONFIG_FILE
from train.config import TrainConfig
from train.config_sections import documents_field
from train.data.batches import load_data
from train.data.packing import Batch, unigram_entropy
from train.data.sources import Source, find_source
from train.evaluation.held_out import make_evaluate
from train.metrics.stability import make_stability
from train.model_and_step import ModelAndStep
from train.parallel.distributed import check_alike, say
from train.parallel.sharding import from_global, from_local, on_mesh, process_share

_FAR = 2  # times the tokenizer's vocabulary, to be said


class Run(ModelAndStep):
    """The documents, the model and the compiled functions of one resolved configuration."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        source: Source | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Reads the documents and builds the model's functions.

        Args:
          config: resolved configuration.
          source: from `find_source`; None: to be found here.
          devices: to run on; None: all of all processes.

        Raises:
          RunError: a corpus that cannot be used, a tokenizer that does not fit the run, or a mesh
            that does not fit.
        """
        super().__init__(config, devices=devices)  # what cannot run is said before data is read
        source = source or find_source(config.data)
        check_tokenizer(config, source.tokenizer)
        self.data = load_data(config, source)
        self.unigram = unigram_entropy(self.data.held_out)
        self.share = process_share(self.mesh)
        evaluate = make_evaluate(
            self.loss,
            self.data.held_out,
            sources=self.data.held_out_places,
            place=partial(from_global, self.mesh),
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
        documents = documents_field(data)
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
        """A few lines on the run; its directory has the whole configuration."""
        config, model = self.config, self.config.model
        parameters = sum(x.size for x in jax.tree.leaves(self.like.params))
        devices = self.mesh.devices
        frozen = ""
        if self.frozen is not None:
            sizes = jax.tree.map(lambda x, y: x.size * y, self.like.params, self.frozen)
            frozen = f" ({sum(jax.tree.leaves(sizes)):,} of them frozen)"
        kinds = ", ".join(dict.fromkeys(model.mixers))
        return (
            f"{config.name}: {model.num_hidden_layers} layers ({kinds}) of width "
            f"{model.hidden_size}, a vocabulary of {model.vocab_size:,}; {config.steps:,} steps of "
            f"{config.batch_size} x {config.sequence_length:,} tokens, {config.dtype}\n"
            f"{config.directory}: {CONFIG_FILE} has the whole configuration\n"
            f"{parameters:,} parameters{frozen}, {self.data.size}, "
            f"{config.tokens_per_step:,} tokens a step, on {devices.size} x "
            f"{devices.flat[0].device_kind} in {jax.process_count()} process(es)"
        )


def fit_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The configuration with the tokenizer's vocabulary size, where that is asked for."""
    if not config.fit_vocab_size:
        if config.model.vocab_size >= _FAR * tokenizer.vocab_size:
            say(
                f"model.vocab_size: {config.model.vocab_size:,} for a tokenizer of "
                f"{tokenizer.vocab_size:,} tokens; the others are never used (--fit-vocab-size "
                "follows the tokenizer)"
            )
        return config
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(config, model=model, fit_vocab_size=False)


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

"""What other people's tools look for beside the tensors of a published folder."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdn_jax.models.config import MDNConfig
from mdn_jax.text.vocabulary import TOKENIZER_FILE, Vocabulary

ARCHITECTURE = "MomentumDeltaNetForCausalLM"
"""The published class."""

KEPT = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that stay as they are from a published folder to the next."""

CARD = "README.md"


def copy_companions(source: Path, target: Path) -> None:
    """Copies the files of `KEPT` that are there."""
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def with_tokens(config: MDNConfig, vocabulary: Vocabulary | None) -> MDNConfig:
    """The configuration with the published class and the ids of a text's first and last token.

    Args:
      config: of the model; what it says of these stays.
      vocabulary: its tokenizer; None: bytes, which have neither.
    """
    fields: dict[str, str] = {"architectures": json.dumps([ARCHITECTURE])}
    if vocabulary is not None:
        ids = {"bos_token_id": vocabulary.opening, "eos_token_id": vocabulary.end_tokens}
        fields |= {name: str(found[0]) for name, found in ids.items() if found}
    return dataclasses.replace(config, extras=tuple((fields | dict(config.extras)).items()))


def write_companions(
    folder: Path, config: MDNConfig, vocabulary: Vocabulary | None, card: str
) -> None:
    """Writes what is not there: configurations of the generation and the tokenizer, a model card.

    Args:
      folder: with the tokenizer's file, if there is one.
      config: from `with_tokens`.
      vocabulary: the tokenizer; None: bytes.
      card: the text of the model card.
    """
    ids = {
        name: json.loads(value)
        for name, value in config.extras
        if name in ("bos_token_id", "eos_token_id") and value != "null"
    }
    _write_new(folder / "generation_config.json", ids)
    if vocabulary is not None and (folder / TOKENIZER_FILE).is_file():
        names = {i: name for name, i in vocabulary.ids.items()}
        tokens = {name.removesuffix("_id"): names[i] for name, i in ids.items() if i in names}
        fixed = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        _write_new(folder / "tokenizer_config.json", fixed | tokens)
    (folder / CARD).write_text(card)


def model_card(
    config: MDNConfig,
    *,
    parameters: int,
    run: Mapping[str, Any],
    step: int,
    held_out_loss: float | None,
) -> str:
    """A model card: what the model is, how it was trained, how to read it.

    Args:
      config: of the model.
      parameters: how many it has.
      run: configuration of its training; that of the model alone if it was converted.
      step: training steps taken.
      held_out_loss: nats/token; None where it was not measured.
    """
    heads = f"{config.num_heads} heads"
    if config.value_heads != config.num_heads:
        heads += f", {config.value_heads} value heads"
    lines = [
        "---",
        "library_name: mdn-jax",
        "pipeline_tag: text-generation",
        "tags: [momentum-deltanet, linear-attention, jax]",
        "---",
        "",
        f"# {run.get('name') or 'Momentum DeltaNet'}",
        "",
        "A language model with Momentum DeltaNet layers (arXiv 2605.05838).",
        "",
        f"- {parameters:,} parameters, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {heads}, vocabulary of {config.vocab_size:,}.",
        *_training(run, step, held_out_loss),
        "",
        "To use it, with mdn-jax:",
        "",
        "    import mdn_jax",
        '    model = mdn_jax.load("this folder")',
        "",
        "The published PyTorch class reads the same files.",
        "",
    ]
    return "\n".join(lines)


def _training(run: Mapping[str, Any], step: int, held_out_loss: float | None) -> list[str]:
    if "steps" not in run:
        return []
    rows, length = run["batch_size"], run["sequence_length"]
    lines = [f"- Trained for {step:,} steps of {rows} rows of {length:,} tokens with mdn-jax."]
    if run.get("init_from"):
        lines.append("- Its training began with the parameters of another model.")
    if dataset := run["data"].get("dataset"):
        lines.append(f"- Data: {dataset}.")
    if held_out_loss is not None:
        lines.append(f"- Loss on held-out text: {held_out_loss:.4f} nats a token.")
    return lines


def _write_new(path: Path, fields: Mapping[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(fields, indent=2) + "\n")

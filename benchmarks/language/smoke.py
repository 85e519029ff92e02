"""The smallest size of `python -m benchmarks language`, and a corpus for it."""

import json
import sysconfig
from pathlib import Path
from typing import Any

from benchmarks.corpus.manifest import HELD_OUT, MANIFEST
from mdn_jax.new_file import write_text

SMOKE: dict[str, Any] = {
    "seeds": (0,),
    "learning_rates": (1e-3,),
    "hidden_size": 16,
    "heads": 1,
    "steps": 4,
    "batch_size": 2,
    "sequence_length": 128,
    "accumulation": 1,
    "warmup_steps": 1,
    "eval_every": 2,
    "eval_rows": 4,
    "stability_every": 2,
    "domain_rows": 4,
    "position_length": 128,
    "position_rows": 2,
    "needle_lengths": (128,),
    "needle_rows": 2,
    "implementation": "scan",
    "dtype": "float32",
}


def tiny_corpus(directory: Path) -> Path:
    """A corpus of a few of the standard library's files, in bytes, made once.

    Args:
      directory: of the corpus.

    Returns:
      The directory.
    """
    from train.config_sections import DataConfig
    from train.data.tokenizing import write_shards

    if (directory / MANIFEST).exists():
        return directory
    library = Path(sysconfig.get_path("stdlib"))
    shards = directory / "shards"
    for name, files in (
        ("documents", "json/*.py"),
        ("test/email", "email/m*.py"),
        ("test/wsgi", "wsgiref/*.py"),
    ):
        data = DataConfig(files=(str(library / files),))
        write_shards(data, shards / name, shard_bytes=1 << 30, processes=1)
    write_text(directory / MANIFEST, json.dumps({"held_out_fraction": HELD_OUT}) + "\n")
    return directory

"""What a run that resumes may change, and what it may not."""

from collections.abc import Mapping
from typing import Any

from mdn_jax.models.config import with_present_names
from train.config import TrainConfig, to_dict
from train.options import flatten, option_of, options


def resume_conflicts(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations (`to_dict`) and may not; one line a field.

    What may is metadata of the field (`option`): nothing that the parameters or the data order
    depend on, but `guard`, which is there to get a run past a place where it failed. `data.files`
    and `data.tokenizer` may, because the checkpoint knows the documents by their digest and the
    run's directory has its tokenizer. `steps` may, because the learning rate follows
    `optimizer.decay_steps`. A field that there was none of when the first was saved had its
    default.
    """
    declared = options(TrainConfig)

    def may_change(name: str) -> bool:
        found = option_of(name, declared)
        return found is not None and found.resume == "may change"

    if "model" in saved:
        saved = {**saved, "model": with_present_names(saved["model"])}
    old, new = flatten(saved), flatten(current)
    old = {name: x for name, x in flatten(to_dict(TrainConfig())).items() if name in new} | old
    return [
        f"{name}: the checkpoint has {old.get(name)!r}, this run {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if not may_change(name) and old.get(name) != new.get(name)
    ]

"""Parameters counted from a configuration, and models that no machine holds."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from configs import CONFIGS
from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.errors import RunError
from mdn_jax.models import AttentionConfig, sizes
from mdn_jax.models.sizes import check_fits, parameter_count
from tests.layers.helpers import TINY
from train.model_and_step import ModelAndStep

MODELS = [
    TINY,
    dataclasses.replace(
        TINY,
        num_hidden_layers=3,
        num_v_heads=4,
        use_lora_gate=True,
        lora_gate_rank=3,
        conv_bias=True,
        use_output_correction=False,
        attn=AttentionConfig(layers=(1,), num_heads=4, num_kv_heads=2, qkv_bias=True),
        tie_word_embeddings=True,
    ),
    dataclasses.replace(TINY, use_momentum=False, use_gate=False, use_short_conv=False),
    dataclasses.replace(
        TINY, num_hidden_layers=3, mixer="kda", other_mixer="comba", other_layers=(1,)
    ),
    dataclasses.replace(TINY, mixer="comba", use_output_correction=False, num_v_heads=6),
    dataclasses.replace(TINY, mixer="gdn2", expand_v=1.5, use_lora_gate=True),
    dataclasses.replace(TINY, mixer="mamba2", num_v_heads=6, intermediate_size=0),
    dataclasses.replace(TINY, mixer="mamba3", num_v_heads=6, conv_bias=True),
    dataclasses.replace(TINY, mixer="titans", num_v_heads=6),
    dataclasses.replace(TINY, mixer="gdn", other_mixer="attention", other_layers=(0,)),
]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.mixer)
def test_the_count_is_that_of_the_model(config):
    model = nnx.eval_shape(lambda: MDNForCausalLM(config, rngs=nnx.Rngs(0)))
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert parameter_count(config) == sum(x.size for x in parameters)


HUGE = MDNConfig(num_hidden_layers=999, hidden_size=2**20)


def test_a_model_above_the_memory_is_refused_by_its_size():
    with pytest.raises(ValueError, match="model: expected at most") as raised:
        check_fits(HUGE, bytes_each=2)
    message = str(raised.value)
    count = parameter_count(HUGE)
    for words in (f"{count:,} parameters", "with 2 bytes each", "num_hidden_layers = 999"):
        assert words in message
    assert float(re.search(r"([\d,.]+) GiB with", message)[1].replace(",", "")) == pytest.approx(
        count * 2 / 2**30, rel=1e-3
    )
    check_fits(TINY, bytes_each=12)


def test_the_memory_is_that_of_the_device_and_of_the_container(monkeypatch, tmp_path):
    device = SimpleNamespace(
        platform="gpu", device_kind="some GPU", memory_stats=lambda: {"bytes_limit": 2**30}
    )
    large = dataclasses.replace(TINY, vocab_size=2**23)  # 2 GiB with 4 bytes
    with pytest.raises(ValueError, match=r"1.0 GiB for each of 2 pieces .*some GPU.*, 2.0 GiB"):
        check_fits(large, bytes_each=4, device=device, pieces=2)
    check_fits(large, bytes_each=4, device=device, pieces=3)
    device.memory_stats = lambda: None  # a device that does not say
    check_fits(HUGE, bytes_each=4, device=device)
    limit = tmp_path / "limit"
    monkeypatch.setattr(sizes, "_CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    small = dataclasses.replace(TINY, vocab_size=2**10)
    limit.write_text("max\n")
    check_fits(small, bytes_each=4)
    limit.write_text("200000\n")
    with pytest.raises(ValueError, match=r"at most 0.0 GiB \(the memory of this machine\)"):
        check_fits(small, bytes_each=4)


def test_a_run_is_refused_before_anything_is_built():
    config = dataclasses.replace(CONFIGS["smoke"](), model=HUGE)
    with pytest.raises(RunError, match=r"model: expected at most .* with 12 bytes each"):
        ModelAndStep(config)

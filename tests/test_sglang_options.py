"""The options of the SGLang backend, which need no SGLang."""

from __future__ import annotations

import pytest

import mac_attn
from mac_attn.integrations.serving.options import Options


def test_options_are_read_under_the_prefix_of_the_engine() -> None:
    env = {
        "MAC_ATTN_SGLANG_CONFIG": '{"threshold": 0.1, "band": 64}',
        "MAC_ATTN_SGLANG_SLOTS": "3",
        "MAC_ATTN_SGLANG_LOG_SECONDS": "0.5",
        "MAC_ATTN_VLLM_SLOTS": "7",
    }
    options = Options.read(env, "MAC_ATTN_SGLANG")
    assert options.layer_config(7, 8, 0, 1) == mac_attn.ReuseConfig(threshold=0.1, band=64)
    assert (options.num_slots, options.log_seconds) == (3, 0.5)
    assert Options.read({}, "MAC_ATTN_SGLANG") == Options()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAC_ATTN_SGLANG_CONFIG", '{"threshhold": 0}'),
        ("MAC_ATTN_SGLANG_CALIBRATION", "/nowhere.json"),
        ("MAC_ATTN_SGLANG_SLOTS", "0"),
        ("MAC_ATTN_SGLANG_SHARE", "2"),
        ("MAC_ATTN_SGLANG_LOG_SECONDS", "-1"),
    ],
)
def test_a_wrong_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is "):
        Options.read({name: value}, "MAC_ATTN_SGLANG")

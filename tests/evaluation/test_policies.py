"""Ablation policies: what each of them changes, and that users are not offered them."""

import msgspec
import pytest

from packforcing.evaluation.policies import comparison_policies
from packforcing.presets import model_config, policies


@pytest.mark.parametrize("name", ["demo", "wan-1.3b", "longlive"])
def test_ablations_change_one_thing_in_packforcing(name):
    table = comparison_policies(model_config(name))
    plain = msgspec.structs.asdict(table["packforcing"])
    changed = {
        preset.removeprefix("packforcing-"): {
            field: value
            for field, value in msgspec.structs.asdict(policy).items()
            if value != plain[field]
        }
        for preset, policy in table.items()
        if preset.startswith("packforcing-")
    }
    assert changed.pop(f"sink-{plain['sink']}", {}) == {}
    assert all(len(fields) == 1 for fields in changed.values())
    assert changed["random"] == {"selection": "random"}
    span = model_config(name).block_frames
    assert changed["quarter-span"] == {"mid_span": span / 4}
    branches = {"high-branch", "low-branch"} & set(changed)
    assert bool(branches) == bool(model_config(name).compressor_widths)


def test_ablations_are_compared_and_not_shipped():
    config = model_config("demo")
    shipped, compared = policies(config), comparison_policies(config)
    assert list(shipped) == ["packforcing", "sliding-window", "sink-window", "full-history"]
    assert shipped.items() <= compared.items() and len(compared) > len(shipped)

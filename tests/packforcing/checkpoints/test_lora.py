"""LoRAs: what they add, and which are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from packforcing.checkpoints.convert import import_checkpoint
from packforcing.errors import CheckpointError
from tests.packforcing.checkpoints.layouts import (
    assert_refused,
    imported,
    lora,
    save,
    self_forcing,
)


@pytest.mark.parametrize(
    ("own", "option", "expected"),
    [
        (None, None, 6.0),  # as LongLive's: alpha is its rank, the scale is 1
        (None, 4.0, 12.0),  # 4 / 2
        (1.0, 4.0, 3.0),  # its own alpha goes first: 1 / 2
    ],
)
def test_a_lora_adds_alpha_over_rank_times_b_a(own, option, expected, weights, tmp_path):
    """Rank 2; A has a 2 at [0, 1] and B a 3 at [0, 0], so that B A has a 6 at [0, 1] alone."""
    down, up = torch.zeros(2, 24), torch.zeros(24, 2)
    down[0, 1], up[0, 0] = 2, 3
    module = "blocks.7.self_attn.q"
    adapter = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    if own is not None:
        adapter[f"{module}.alpha"] = torch.tensor(own)
    save_file(adapter, tmp_path / "style.safetensors")
    files = [*self_forcing(tmp_path, weights), tmp_path / "style.safetensors"]
    import_checkpoint(files, tmp_path / "model", kind="self-forcing", lora_alpha=option)

    copied = imported(tmp_path / "model")
    changed = copied[f"transformer.{module}.weight"] - weights[f"{module}.weight"]
    assert changed[0, 1].item() == pytest.approx(expected, abs=1e-6)
    changed[0, 1] = 0
    assert not changed.any()
    rest = set(weights) - {f"{module}.weight"}
    assert all(copied[f"transformer.{name}"].equal(weights[name]) for name in rest)


def test_a_lora_that_does_not_fit_is_refused_by_name(weights, tmp_path):
    adapter = lora(layers=2)
    adapter["base_model.model.blocks.0.ffn.0.lora_A.weight"] = torch.zeros(2, 7)
    adapter["base_model.model.blocks.99.ffn.0.lora_A.weight"] = torch.zeros(2, 24)
    adapter["base_model.model.blocks.0.ffn.2.alpha"] = torch.zeros(2)
    del adapter["base_model.model.blocks.1.ffn.2.lora_B.weight"]
    files = [*self_forcing(tmp_path, weights), save(tmp_path / "lora.pt", adapter)]
    with pytest.raises(CheckpointError) as raised:
        import_checkpoint(files, tmp_path / "model", kind="self-forcing")
    for part in (
        "1 missing, 1 unexpected, 2 misshaped",
        "missing blocks.1.ffn.2.B",
        "unexpected blocks.99.ffn.0.A",
        "misshaped blocks.0.ffn.0.A: (2, 7)",
        "misshaped blocks.0.ffn.2.alpha",
    ):
        assert part in str(raised.value)


def one_lora(path, down, up, **more) -> Path:
    """On one of the weights [24, 24], of rank 1."""
    names = {"lora_A.weight": down, "lora_B.weight": up, **more}
    save_file({f"blocks.7.self_attn.q.{name}": tensor for name, tensor in names.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool])
def test_a_lora_of_another_dtype_is_refused(dtype, weights, tmp_path):
    adapter = torch.ones(1, 24).to(dtype), torch.ones(24, 1).to(dtype)
    files = [*self_forcing(tmp_path, weights), one_lora(tmp_path / "lora.safetensors", *adapter)]
    assert_refused(files, tmp_path, "lora.safetensors holds .*; only F32, F16, BF16 can be read")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_not_finite_is_refused(alpha, weights, tmp_path):
    adapter, path = (torch.ones(1, 24), torch.ones(24, 1)), tmp_path / "lora.safetensors"
    files = [*self_forcing(tmp_path, weights), one_lora(path, *adapter)]
    assert_refused(
        files, tmp_path, f"alpha of blocks.7.self_attn.q in .* is {alpha}", lora_alpha=alpha
    )
    one_lora(path, *adapter, alpha=torch.tensor(alpha))
    assert_refused(files, tmp_path, f"alpha of blocks.7.self_attn.q in .* is {alpha}")


def test_a_lora_that_overflows_the_weights_is_refused(weights, tmp_path):
    """float16 ends at 65504."""
    halves = {name: tensor.half() for name, tensor in weights.items()}
    adapter = one_lora(tmp_path / "lora.safetensors", torch.ones(1, 24), torch.ones(24, 1))
    files = [*self_forcing(tmp_path, halves), adapter]
    message = "transformer.blocks.7.self_attn.q.weight has values .* finite in F16"
    assert_refused(files, tmp_path, message, lora_alpha=65600.0)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}
    import_checkpoint(files, tmp_path / "model", kind="self-forcing", lora_alpha=65000.0)

"""LoRAs beside a checkpoint: strengths, several of them, what is reported, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from packforcing.app.cli import main
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.lora import split_strength
from packforcing.checkpoints.published import WEIGHTS, read_model_folder
from packforcing.errors import CheckpointError
from tests.packforcing.checkpoints.layouts import (
    assert_refused,
    imported,
    run_command,
    self_forcing,
)
from tests.packforcing.checkpoints.lora_files import Q, save_lora


def one_lora(path: Path, down=None, up=None, **more) -> Path:
    """Of rank 1 on one of the weights [24, 24]; B A is 1 everywhere if nothing else is said."""
    down = torch.ones(1, 24) if down is None else down
    up = torch.ones(24, 1) if up is None else up
    names = {"lora_A.weight": down, "lora_B.weight": up, **more}
    return save_lora(path, {f"{Q}.{name}": tensor for name, tensor in names.items()})


def change(files, weights, tmp_path, **options) -> float:
    """Import, and return by how much the LoRAs changed the weight, the same everywhere."""
    import_checkpoint(files, tmp_path / "model", kind="self-forcing", **options)
    copied = imported(tmp_path / "model")
    difference = copied[f"transformer.{Q}.weight"] - weights[f"{Q}.weight"]
    assert difference.max() - difference.min() < 1e-5
    rest = set(weights) - {f"{Q}.weight"}
    assert all(copied[f"transformer.{name}"].equal(weights[name]) for name in rest)
    return difference.mean().item()


@pytest.mark.parametrize(
    ("own", "option", "strength", "expected"),
    [
        (None, None, "", 1.0),  # alpha is taken to be the rank
        (None, 4.0, "", 4.0),
        (3.0, None, "", 3.0),
        (3.0, None, ":0.5", 1.5),
        (None, None, ":-2", -2.0),
        (None, 4.0, ":.25", 1.0),
        (3.0, None, ":0", 0.0),
    ],
)
def test_a_lora_adds_strength_times_alpha_over_rank(
    own, option, strength, expected, weights, tmp_path
):
    more = {"alpha": torch.tensor(own)} if own else {}
    path = one_lora(tmp_path / "style.safetensors", **more)
    files = [*self_forcing(tmp_path, weights), f"{path}{strength}"]
    added = change(files, weights, tmp_path, lora_alpha=option)
    assert added == pytest.approx(expected, abs=1e-5)


def test_several_loras_add_up_in_any_order(weights, tmp_path):
    first = one_lora(tmp_path / "a.safetensors", alpha=torch.tensor(3.0))
    second = one_lora(tmp_path / "b.safetensors")  # takes its alpha from the option
    [model] = self_forcing(tmp_path, weights)
    for number, loras in enumerate(
        ([f"{first}:0.5", f"{second}:2"], [f"{second}:2", f"{first}:0.5"])
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        added = change([model, *loras], weights, folder, lora_alpha=4.0)
        assert added == pytest.approx(0.5 * 3 + 2 * 4, abs=1e-5)


def test_the_result_says_where_each_scale_is_from(weights, tmp_path):
    path = one_lora(tmp_path / "style.safetensors")
    other = one_lora(tmp_path / "b" / "adapter_model.safetensors")
    (tmp_path / "b" / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 2}')
    args = [*self_forcing(tmp_path, weights), f"{path}:0.8", "--lora", other.parent]
    args += ["--model", "self-forcing", "--out"]
    output = run_command("import-checkpoint", *args, tmp_path / "model")
    lines = (
        "style.safetensors: LoRA merged into 1 weights at scale 1, strength 0.8; assumed for 1 "
        "modules: they have no alpha, so it is taken to be the rank (--lora-alpha states another)",
        "adapter_model.safetensors: LoRA merged into 1 weights at scale 2; alpha is from "
        "adapter_config.json",
    )
    assert all(line in output for line in lines)
    with safe_open(tmp_path / "model" / WEIGHTS, "pt") as file:
        assert file.metadata()["loras"] == "\n".join(lines)
    assert '"style.safetensors:0.8"' in (tmp_path / "model" / "model.json").read_text()
    with pytest.raises(CheckpointError, match=r"dmd.pt style\.safetensors:0\.8 b taew2_1"):
        read_model_folder(tmp_path / "model")  # which has no autoencoder
    report = json.loads(run_command("import-checkpoint", *args, tmp_path / "again", "--json"))
    assert report["loras"] == [
        {"file": "style.safetensors", "parameters": 1, "strength": 0.8, "scales": [1.0],
         "sources": [], "assumed": 1, "unused": []},
        {"file": "adapter_model.safetensors", "parameters": 1, "strength": 1.0, "scales": [2.0],
         "sources": ["adapter_config.json"], "assumed": 0, "unused": []},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("x.safetensors", "x.safetensors", None),
        ("x.safetensors:0.8", "x.safetensors", 0.8),
        ("a/x.safetensors:-1e-1", "a/x.safetensors", -0.1),
        (r"C:\x.safetensors", r"C:\x.safetensors", None),
        (r"C:\x.safetensors:0.8", r"C:\x.safetensors", 0.8),
        ("C:/x.safetensors:1", "C:/x.safetensors", 1.0),
        ("C:5", "C:5", None),  # a file on a drive
        ("x:y.safetensors", "x:y.safetensors", None),
        ("x:y.safetensors:2", "x:y.safetensors", 2.0),
        (":0.5", ":0.5", None),
        ("none.safetensors:nan", "none.safetensors:nan", None),
        ("there:1", "there:1", None),  # a file of this name is there
        ("there:1:0.5", "there:1", 0.5),
    ],
)
def test_a_strength_is_told_from_a_path(text, path, strength, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there:1").touch()
    assert split_strength(text) == (path, strength)


@pytest.mark.parametrize("strength", ["", "x", "nan", "inf", "1e999", "0,8"])
def test_a_strength_that_is_no_number_is_refused(strength, weights, tmp_path):
    path = one_lora(tmp_path / "style.safetensors")
    files = [*self_forcing(tmp_path, weights), f"{path}:{strength}"]
    assert_refused(files, tmp_path, f"'{strength}' is not a strength for ", kind="self-forcing")


def test_an_option_without_effect_is_refused(weights, tmp_path):
    [model] = self_forcing(tmp_path, weights)
    options = {"kind": "self-forcing"}
    assert_refused([f"{model}:0.8"], tmp_path, "dmd.pt is no LoRA: leave out .* :0.8", **options)
    options["lora_alpha"] = 4.0
    assert_refused([model], tmp_path, "--lora-alpha has no effect: no FILE is a LoRA", **options)
    path = one_lora(tmp_path / "a.safetensors", alpha=torch.tensor(1.0))
    message = "states its own alpha in its .alpha tensors. Leave it out; FILE:STRENGTH changes"
    assert_refused([model, path], tmp_path, message, **options)
    save_file({f"{Q}.diff": torch.ones(24, 24)}, path)
    assert_refused([model, path], tmp_path, "no effect: the LoRA has no rank", **options)
    assert_refused([path, path], tmp_path, "a.safetensors is named twice")
    result = CliRunner().invoke(
        main, ["import-checkpoint", str(model), "--model", "self-forcing", "--lora-alpha", "2",
               "--out", str(tmp_path / "model")]
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--lora-alpha has no effect" in result.stderr


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.int8])
def test_a_lora_of_integers_is_refused(dtype, weights, tmp_path):
    path = one_lora(tmp_path / "l.safetensors", *(torch.ones(shape).to(dtype) for shape in
                                                  ((1, 24), (24, 1))))  # fmt: skip
    files = [*self_forcing(tmp_path, weights), path]
    message = f"l.safetensors .*{Q}.lora_A.weight"
    assert_refused(files, tmp_path, message, kind="self-forcing")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0])
def test_an_alpha_that_is_no_scale_is_refused(alpha, weights, tmp_path):
    path = one_lora(tmp_path / "lora.safetensors")
    files = [*self_forcing(tmp_path, weights), path]
    message = f"{Q}.lora_A.weight in the LoRA .* has a scale of {alpha:g} by "
    options = {"kind": "self-forcing"}
    assert_refused(files, tmp_path, message + "--lora-alpha", lora_alpha=alpha, **options)
    one_lora(path, alpha=torch.tensor(alpha))
    assert_refused(files, tmp_path, message + "its .alpha tensors", **options)


def test_a_lora_that_overflows_the_weights_is_refused(weights, tmp_path):
    """float16 ends at 65504."""
    halves = {name: tensor.half() for name, tensor in weights.items()}
    path = one_lora(tmp_path / "lora.safetensors")
    files = [*self_forcing(tmp_path, halves), path]
    message = f"lora.safetensors, transformer.{Q}.weight has values .* finite in F16"
    options = {"kind": "self-forcing"}
    assert_refused(files, tmp_path, message, lora_alpha=65600.0, **options)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}
    import_checkpoint(files, tmp_path / "model", lora_alpha=65000.0, **options)


def test_sums_are_rounded_once(weights, tmp_path):
    """In bfloat16, 256 + 0.75 + 0.75 is 256 where each sum is rounded, and 258 in the end."""
    whole = {name: tensor.bfloat16() for name, tensor in weights.items()}
    whole[f"{Q}.weight"] = torch.full((24, 24), 256.0, dtype=torch.bfloat16)
    files = [one_lora(tmp_path / f"{name}.safetensors") for name in "ab"]
    files = [*self_forcing(tmp_path, whole), *(f"{file}:0.75" for file in files)]
    import_checkpoint(files, tmp_path / "model", kind="self-forcing")
    merged = imported(tmp_path / "model")[f"transformer.{Q}.weight"]
    assert merged.unique().tolist() == [258.0]

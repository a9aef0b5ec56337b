"""Every form in which people have checkpoints is read right, or named for what it is."""

import json
import struct

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from packforcing import MODELS
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.reading import list_tensors, tensor_reader
from packforcing.errors import MissingDependency
from packforcing.presets import model_config
from tests.packforcing.checkpoints.forms import IN_PLACE, QUANTIZED, READ, TEXT_ENCODER
from tests.packforcing.checkpoints.layouts import (
    assert_refused,
    imported,
    lora,
    prefixed,
    save,
    wan_shapes,
)

KIND = "self-forcing"


@pytest.fixture(autouse=True)
def two_layers(monkeypatch, tiny_models):
    """As wide as a block of GGUF's quantizations."""
    config = msgspec.structs.replace(
        model_config(KIND), layers=2, dim=32, ffn_dim=64, text_dim=32, freq_dim=32
    )
    monkeypatch.setitem(MODELS, KIND, config)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = wan_shapes(32, 64, 32, 32, 2)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", READ, ids=[form.__name__ for form in READ])
def test_a_form_gives_the_weights_that_it_stands_for(form, weights, tmp_path):
    (tmp_path / "source").mkdir()
    path, expected = form(tmp_path / "source", weights)
    import_checkpoint([path], tmp_path / "model", kind=KIND)
    copied = imported(tmp_path / "model")
    assert len(copied) == len(expected) == len(weights)
    for name, tensor in expected.items():
        assert copied[f"transformer.{name}"].float().equal(tensor.float()), name
        error = (tensor.float() - weights[name]).norm() / weights[name].norm()
        assert error < 0.06  # of fp8 with three bits, Q8_0


def test_what_was_dequantized_is_reported(weights, tmp_path):
    (tmp_path / "a").mkdir()
    form = next(form for form in READ if form.__name__ == "gguf_file")
    done = import_checkpoint([form(tmp_path / "a", weights)[0]], tmp_path / "model", kind=KIND)
    assert done.lines == ["a.gguf: transformer, 69 tensors, GGUF, dequantized from Q8_0"]


def test_an_all_in_one_checkpoint_gives_its_autoencoder_too(weights, wan_vae, tmp_path):
    """ComfyUI's CheckpointSave: first_stage_model. An autoencoder in a file of its own is used
    instead, and both are reported."""
    tensors = prefixed(weights, "model.diffusion_model.")
    tensors |= prefixed(wan_vae, "first_stage_model.") | prefixed(TEXT_ENCODER, "text_encoders.t.")
    save_file(tensors, tmp_path / "all.safetensors")
    done = import_checkpoint([tmp_path / "all.safetensors"], tmp_path / "model", kind=KIND)
    assert done.folder.config.vae == "wan"
    copied = imported(tmp_path / "model")
    assert all(copied[f"autoencoder.{name}"].equal(tensor) for name, tensor in wan_vae.items())
    assert done.lines[0] == (
        "all.safetensors: transformer, 69 tensors, autoencoder, 194 tensors of "
        "'first_stage_model' (not text_encoders.t), safetensors, diffusers' names"
    )
    alone = save(tmp_path / "vae.pth", {name: tensor + 1 for name, tensor in wan_vae.items()})
    files = [tmp_path / "all.safetensors", alone]
    done = import_checkpoint(files, tmp_path / "other", kind=KIND)
    copied = imported(tmp_path / "other")
    assert all(copied[f"autoencoder.{name}"].equal(t + 1) for name, t in wan_vae.items())
    assert "(not first_stage_model, text_encoders.t)" in done.lines[0]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.gguf"])
@pytest.mark.parametrize("form", IN_PLACE)
def test_what_comes_in_place_of_weights_is_named(form, name, tmp_path):
    content, message = IN_PLACE[form]
    (tmp_path / name).write_bytes(content)
    assert_refused([tmp_path / name], tmp_path, message)


@pytest.mark.parametrize("form", QUANTIZED)
def test_a_quantization_that_is_not_read_is_named(form, tmp_path):
    tensors, message = QUANTIZED[form]
    save_file(tensors, tmp_path / "a.safetensors")
    assert_refused([tmp_path / "a.safetensors"], tmp_path, message)
    assert_refused([save(tmp_path / "a.pt", {"model": tensors})], tmp_path, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.safetensors.crdownload", "has not ended"), ("a.safetensors.part", "has not ended")],
)
def test_a_download_that_has_not_ended_is_named(name, message, weights, tmp_path):
    save_file(weights, tmp_path / name)
    assert_refused([tmp_path / name], tmp_path, message)


def test_a_file_that_aria2_has_reserved_is_refused(weights, tmp_path):
    """It has its size, and zeros where nothing has come yet."""
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors.aria2").touch()
    assert_refused([tmp_path / "a.safetensors"], tmp_path, "has not ended")


def test_folders_of_other_kinds_are_named(weights, tmp_path):
    for name, file, message in (
        ("pipe", "model_index.json", "a diffusers pipeline without its 'transformer' folder"),
        ("made", "model.json", "a model folder already.*export --weights"),
        ("dcp", ".metadata", "a distributed checkpoint.*dcp_to_torch"),
        ("none", "config.json", "holds no .safetensors file"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        assert_refused([tmp_path / name], tmp_path / "x", message)
    (tmp_path / "root" / "transformer").mkdir(parents=True)
    save_file(weights, tmp_path / "root" / "transformer" / "a.safetensors")
    assert_refused([tmp_path / "root"], tmp_path, r"\(transformer in it do\)")
    for name in ("a.pt", "b.pt"):
        save(tmp_path / "two" / name, weights)
    assert_refused([tmp_path / "two"], tmp_path, "holds several files: name one of a.pt, b.pt")
    for name in ("a", "b.fp16"):
        (tmp_path / "two" / f"{name}.index.json").write_text("{}")
    assert_refused([tmp_path / "two"], tmp_path, "holds several checkpoints: name one of")


@pytest.mark.parametrize(
    "index",
    ["{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
     '{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}'],
)  # fmt: skip
def test_an_index_without_shards_beside_it_is_refused(index, tmp_path):
    (tmp_path / "a.safetensors.index.json").write_text(index)
    assert_refused([tmp_path], tmp_path / "x", "is not the index of a sharded checkpoint")


@pytest.mark.parametrize("form", ["a Git LFS pointer", "a web page", "nothing", "zip"])
def test_what_comes_in_place_of_an_index_is_named(form, tmp_path):
    content, message = IN_PLACE[form]
    (tmp_path / "a.safetensors.index.json").write_bytes(content)
    assert_refused([tmp_path], tmp_path / "x", message)


def test_an_index_of_any_name_is_read(weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "a.safetensors")}
    (tmp_path / "renamed.json").write_text(json.dumps(index))
    done = import_checkpoint([tmp_path / "renamed.json"], tmp_path / "model", kind=KIND)
    assert done.tensors == len(weights)


def test_parts_in_another_parts_place_are_named(weights, wan_vae, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    save_file(wan_vae, tmp_path / "vae.safetensors")
    save_file(TEXT_ENCODER, tmp_path / "text.safetensors")
    save_file(lora(layers=1), tmp_path / "lora.safetensors")
    save_file({"visual.proj": torch.zeros(1)}, tmp_path / "clip.safetensors")
    for files, message in (
        (["vae"], "none of .*vae.safetensors holds a transformer.*this is an autoencoder"),
        (["lora"], "holds a transformer.*this is a LoRA"),
        (["vae", "lora"], "holds a transformer.*this is an autoencoder and a LoRA"),
        (["text"], "text.safetensors holds a text encoder: .*encode-prompt --encoder"),
        (["model", "text"], "text.safetensors holds a text encoder: .*leave it out here"),
        (["model", "clip"], "clip.safetensors holds an image encoder"),
    ):
        assert_refused([tmp_path / f"{name}.safetensors" for name in files], tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_embedding.weight": (32, 36, 1, 2, 2)}, "an image-to-video model"),
        ({"blocks.0.cross_attn.k_img.weight": (32, 32)}, "an image-to-video model"),
        ({"img_emb.proj.0.weight": (4,)}, "an image-to-video model"),
        ({"vace_blocks.0.before_proj.bias": (4,)}, "VACE"),
        ({"patch_embedding.weight": (3072, 48, 1, 2, 2)}, "Wan2.2 5B"),
        ({"patch_embedding.weight": (5120, 16, 1, 2, 2), "blocks.39.ffn.0.bias": (4,)},
         "a 14B model, a model of 40 layers of width 5120"),
        ({"ref_conv.weight": (4,)}, "a Fun-Control model"),
        ({"audio_proj.weight": (4,)}, "a speech-to-video model"),
    ],
)  # fmt: skip
def test_other_models_of_wan_are_named(changes, message, weights, tmp_path):
    tensors = weights | {name: torch.zeros(shape) for name, shape in changes.items()}
    path = tmp_path / "a.safetensors"
    save_file(prefixed(tensors, "model.diffusion_model."), path)
    message = f"holds .*{message}.*which is none of the models here: it does not hold the weights"
    assert_refused([path], tmp_path, message)


def test_an_autoencoders_name_without_one_is_refused(weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    message = "--vae taehv has no effect: none of .* is an autoencoder"
    assert_refused([tmp_path / "a.safetensors"], tmp_path, message, vae="taehv")


def test_autoencoders_of_other_models_are_named(weights, wan_vae, tiny_autoencoder, tmp_path):
    """Wan2.2's, and the tiny one for it (taew2_2), by the channels of their latents."""
    save_file(weights, tmp_path / "a.safetensors")
    wide = wan_vae | {"post_quant_conv.weight": torch.zeros(48, 48, 1, 1, 1)}
    tiny = torch.load(tiny_autoencoder, weights_only=True)
    tiny["decoder.1.weight"] = torch.zeros(8, 48, 3, 3)
    for tensors, options in ((wide, {}), (tiny, {"vae": "taehv"})):
        files = [tmp_path / "a.safetensors", save(tmp_path / "vae.pth", tensors)]
        message = r"holds an autoencoder of 48 latent channels \(Wan2.2\), which is none"
        assert_refused(files, tmp_path, message, **options)


def test_a_shard_alone_is_named(weights, tmp_path):
    save_file(weights, tmp_path / "a-00002-of-00003.safetensors")
    message = "comes in 3 shards, and these are missing: 00001, 00003"
    assert_refused([tmp_path / "a-00002-of-00003.safetensors"], tmp_path, message)


def test_weights_that_are_not_finite_are_refused(weights, tmp_path):
    for value in (float("nan"), float("-inf")):
        damaged = {name: tensor.clone() for name, tensor in weights.items()}
        damaged["blocks.1.ffn.0.weight"][3, 7] = value
        save_file(damaged, tmp_path / "a.safetensors")
        message = "blocks.1.ffn.0.weight with values that are not finite"
        assert_refused([tmp_path / "a.safetensors"], tmp_path, message)


def test_a_scale_that_is_not_finite_is_refused(weights, tmp_path):
    form = next(form for form in READ if form.__name__ == "lightx2v_fp8")
    path, _ = form(tmp_path, weights)
    tensors = load_file(path)
    tensors["blocks.1.ffn.0.weight_scale"][2] = float("nan")
    save_file(tensors, path)
    assert_refused([path], tmp_path, "a scale of blocks.1.ffn.0.weight that is not finite")


# GGUF


def gguf_kinds() -> list[str]:
    gguf = pytest.importorskip("gguf")
    return [kind.name for kind in gguf.GGMLQuantizationType]


@pytest.mark.parametrize("kind", gguf_kinds())
def test_every_quantization_of_gguf_is_dequantized_or_refused_by_name(kind, tmp_path):
    """Random blocks, against the package's own result on its own reading of the file."""
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    rows, columns, path = 4, 256, tmp_path / "a.gguf"
    packed = np.random.default_rng(1).integers(
        0, 256, (rows, columns // block * block_bytes), np.uint8
    )
    if kind in ("F16", "BF16", "F32", "F64"):
        packed &= 0x3B  # no infinities
    writer = gguf.GGUFWriter(None, "wan")
    writer.add_array("comfy.gguf.orig_shape.b.weight", (2, 2, 16, 16))
    for name in ("a.weight", "b.weight"):
        writer.add_tensor(name, packed, raw_dtype=number)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    try:
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(reader.tensors[0].data, number)
    except NotImplementedError:
        assert_refused([path], tmp_path, f"a.weight as {kind}, which the gguf package cannot")
        return
    plain, reshaped = list_tensors(path)
    assert plain.shape == (rows, columns) and reshaped.shape == (2, 2, 16, 16)
    with np.errstate(all="ignore"):
        values = tensor_reader(path)(plain), tensor_reader(path)(reshaped)
    for one in values:
        np.testing.assert_array_equal(one.float().numpy().ravel(), expected.ravel())


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (8, 2**60, "is damaged or cut off"),  # tensors
        (16, 2**60, "is damaged or cut off"),  # entries
        (24, 2**62, "is damaged or cut off"),  # the length of the first key
    ],
)
def test_a_gguf_header_that_claims_terabytes_is_refused(
    position, value, message, weights, tmp_path
):
    form = next(form for form in READ if form.__name__ == "gguf_file")
    path, _ = form(tmp_path, weights)
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, position, value)
    path.write_bytes(content)
    assert_refused([path], tmp_path, message)
    path.write_bytes(content[: len(content) // 2])
    assert_refused([path], tmp_path, message)


def test_without_the_gguf_package_the_extra_is_named(weights, tmp_path, monkeypatch):
    import sys

    form = next(form for form in READ if form.__name__ == "gguf_file")
    path, _ = form(tmp_path, weights)
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"reading a.gguf needs gguf.*\[gguf\]"):
        import_checkpoint([path], tmp_path / "model", kind=KIND)


def test_a_part_of_a_split_gguf_file_is_named(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(None, "wan")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file(tmp_path / "a.gguf")
    writer.write_kv_data_to_file()
    writer.close()
    assert_refused([tmp_path / "a.gguf"], tmp_path, "one of 3 parts.*--merge")


# Torch checkpoints


def test_tensors_that_claim_more_than_is_stored_are_refused(weights, tmp_path):
    """A view of one value, repeated: it may claim terabytes."""
    tensors = weights | {"blocks.0.ffn.0.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}
    path = save(tmp_path / "a.pt", {"generator_ema": tensors})
    assert_refused([path], tmp_path, "misshaped")
    tensors["blocks.0.ffn.0.weight"] = torch.zeros(1).expand(64, 32)
    path = save(tmp_path / "a.pt", {"generator_ema": tensors})
    assert_refused([path], tmp_path, "as a repeated view of fewer values")


def test_a_pickle_that_asks_for_memory_is_refused(weights, tmp_path):
    path = save(tmp_path / "a.pt", {"generator_ema": weights, "x": bytearray(3)})
    assert_refused([path], tmp_path, r"would run code when loaded \(builtins.bytearray\)")


def test_dictionaries_that_hold_one_another_many_times_are_refused(weights, tmp_path):
    content = dict(weights)
    for _ in range(7):
        content = {f"k{number}": content for number in range(40)}
    assert_refused([save(tmp_path / "a.pt", content)], tmp_path, "more than 100000 entries")


def test_a_torch_checkpoint_of_another_name_is_read_or_named(weights, tmp_path):
    path = save(tmp_path / "a.bin", weights)
    import_checkpoint([path], tmp_path / "model", kind=KIND)
    path.rename(tmp_path / "a.safetensors")
    message = "is a torch checkpoint by its content: rename it"
    assert_refused([tmp_path / "a.safetensors"], tmp_path / "x", message)
    save_file(weights, tmp_path / "b.pt")  # the other way round nothing is in the way
    import_checkpoint([tmp_path / "b.pt"], tmp_path / "other", kind=KIND)


def test_meta_and_sparse_tensors_are_refused(weights, tmp_path):
    for tensor in (torch.zeros(64, 32, device="meta"), torch.zeros(64, 32).to_sparse()):
        content = weights | {"blocks.0.ffn.0.weight": tensor}
        path = save(tmp_path / "a.pt", {"generator_ema": content})
        assert_refused([path], tmp_path, "blocks.0.ffn.0.weight as a tensor of layout|damaged")

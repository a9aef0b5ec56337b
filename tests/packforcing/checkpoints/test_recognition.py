"""Which model and which part of it a file is: every published layout."""

import json
import re
import shutil
from math import prod

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from packforcing import model_config
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.fetch import RECORD, fetch, look_up, next_commands
from packforcing.checkpoints.published import (
    PARTS,
    PUBLISHED,
    WEIGHTS,
    read_model_folder,
)
from packforcing.errors import CheckpointError
from packforcing.model import load_model, open_weights, weight_shapes
from packforcing.origins import UNKNOWN, Origin, describe_licenses
from packforcing.presets import PAPER, with_autoencoder
from packforcing.rope import block_positions, rope_table
from packforcing.transformer import patchify, unpatchify
from tests.packforcing.checkpoints.layouts import (
    CASES,
    LAYOUTS,
    LICENSE,
    LINEAR,
    assert_refused,
    diffusers_name,
    imported,
    prefixed,
    record_fetched,
    save,
    self_forcing,
    wan_shapes,
    wan_vae_name,
)


def test_the_list_of_tensors_is_wans():
    """825 tensors, 1,418,996,800 parameters; checked against our own without allocating one."""
    shapes = wan_shapes()
    assert len(shapes) == 825 and sum(map(prod, shapes.values())) == 1_418_996_800
    ours = weight_shapes(PAPER)
    assert {f"transformer.{name}": shape for name, shape in shapes.items()} == {
        name: shape for name, shape in ours.items() if name.startswith("transformer.")
    }
    added = sum(256 * sum(shapes[f"blocks.0.{name}.weight"]) for name in LINEAR) * 30
    assert added == 349_962_240  # LongLive's LoRA of rank 256


def test_names_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert theirs == {diffusers_name(name): shape for name, shape in wan_shapes().items()}


def test_a_block_equals_that_of_diffusers_transformer(tiny_autoencoder, tmp_path):
    """Saved by diffusers with random weights in every tensor, imported here, and result the same:
    the flow of one block with no history is that of a clip whose frames share a timestep."""
    diffusers = pytest.importorskip("diffusers")
    kind = "wan2.1-t2v-1.3b"
    config = model_config(kind)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=config.heads, attention_head_dim=config.head_dim,
        num_layers=config.layers, ffn_dim=config.ffn_dim, text_dim=config.text_dim,
        freq_dim=config.freq_dim,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(6)
    for name, tensor in theirs.state_dict().items():  # norms too, whose weights begin as ones
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in name))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    files = [tmp_path / "theirs", tiny_autoencoder]
    import_checkpoint(files, tmp_path / "model", kind=kind, vae="taehv")
    ours = load_model(config, tmp_path / "model" / WEIGHTS).transformer

    frames = config.block_frames, config.latent_channels, *config.latent_size
    latents = torch.randn(1, *frames, generator=generator)
    text = torch.randn(1, config.text_len, config.text_dim, generator=generator)
    rope = tuple(map(torch.from_numpy, rope_table(block_positions(config, 0), config.head_dim)))
    empty = torch.zeros(1, config.heads, 0, config.head_dim)
    nothing = [(empty, empty)] * config.layers, tuple(table[:0] for table in rope)
    for timestep in (torch.tensor([937.5]), torch.tensor([0.0])):
        with torch.no_grad():
            expected = theirs(latents.transpose(1, 2), timestep, text).sample.transpose(1, 2)
            flow, *_ = ours(
                patchify(latents, config.patch), torch.zeros(()), timestep, ours.cross_kv(text),
                rope, *nothing,
            )  # fmt: skip
        assert 0.3 < expected.std() < 30
        copied = unpatchify(flow, config.grid, config.patch)
        torch.testing.assert_close(copied, expected, rtol=0, atol=1e-4)


def test_every_published_model_has_a_layout_here():
    assert set(LAYOUTS) == set(PUBLISHED)


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[layout.__name__ for _, layout in CASES])
def test_layouts_are_recognized_and_give_the_same_weights(
    kind, layout, weights, tiny_autoencoder, tmp_path
):
    """As fetched, no option; entries that are not run are left alone."""
    files = layout(tmp_path, weights)
    if PUBLISHED[kind].source and layout in LAYOUTS.values():
        fetched = [tmp_path / path for path in PUBLISHED[kind].files]
        for file, path in zip(files, fetched, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            file.rename(path)
        record_fetched(files := fetched, kind, tmp_path)
        done = import_checkpoint([*files, tiny_autoencoder], tmp_path / "model", vae="taehv")
        assert done.why == f"fetched from {PUBLISHED[kind].source}"
        assert done.folder.origins[0].source == PUBLISHED[kind].source
        assert {origin.license for origin in done.folder.origins[:-1]} == {LICENSE}
    else:  # no file of the published name
        done = import_checkpoint(
            [*files, tiny_autoencoder], tmp_path / "model", kind=kind, vae="taehv"
        )
        assert describe_licenses(done.folder.origins) == UNKNOWN

    assert done.folder.kind == kind and done.tensors == 825 + 128
    assert done.folder.config == model_config(kind)
    copied = imported(tmp_path / "model")
    for name, tensor in weights.items():
        atol = 1e-5 if kind == "longlive" else 0  # W - B A + B A, in float32
        torch.testing.assert_close(copied[f"transformer.{name}"], tensor, atol=atol, rtol=0)
    autoencoder = torch.load(tiny_autoencoder, weights_only=True)
    for name, tensor in autoencoder.items():
        assert tensor.dtype == torch.float16 and copied[f"autoencoder.{name}"].equal(tensor)
    assert len(open_weights(done.folder.config, tmp_path / "model" / WEIGHTS)) == 825 + 128

    if PUBLISHED[kind].refused:
        with pytest.raises(CheckpointError, match=PUBLISHED[kind].refused):
            read_model_folder(tmp_path / "model")
    else:
        assert read_model_folder(tmp_path / "model") == done.folder


def test_a_model_that_tensors_do_not_tell_needs_an_option(weights, tmp_path):
    path = save(tmp_path / "mine.pt", {"generator": prefixed(weights)})
    message = r"several models have these tensors: name it with --model; known.*causvid"
    assert_refused([path], tmp_path, message, kind=None)
    done = import_checkpoint([path], tmp_path / "model", kind="causal-forcing")
    assert (done.folder.kind, done.folder.autoencoder) == ("causal-forcing", False)
    with pytest.raises(CheckpointError, match=r"no autoencoder: .*mine.pt taew2_1"):
        read_model_folder(tmp_path / "model")


# Files of the family as published or renamed, with what their names suggest
HINTS = {
    "causal_forcing-framewise.safetensors": "causal-forcing-frame: --model causal-forcing-frame)",
    "framewise/causal_forcing.pt": "causal-forcing-frame: ",
    "chunkwise/causal_forcing.pt": "causal-forcing: ",
    "causal-forcing++/framewise-2step.pt": "causal-forcing-frame-2step: ",
    "Self-Forcing_DMD_bf16.safetensors": "self-forcing: ",
    "autoregressive_checkpoint/model.pt": "causvid: ",
    "CausVid-1.3B.pt": "causvid: ",
    "longlive_base.pt": "longlive: ",
    "rolling_forcing_dmd.pt": "rolling-forcing: ",
    "wan2.1_t2v_1.3B_bf16.safetensors": "wan2.1-t2v-1.3b: ",
    "chunkwise/ar_diffusion.pt": "a causal model before distillation, which needs many guided",
    "causal-forcing-ar-diffusion.safetensors": "a causal model before distillation",
    "checkpoints/ode_init.pt": "an initialization for distillation, which none of them is",
    "chunkwise/causal_ode.pt": "an initialization for distillation",
    "framewise/causal_cd.pt": "an initialization for distillation",
    "bidirectional_checkpoint1/model.pt": "a model that is not causal",
    "self_forcing_real_score.pt": "a teacher",
    "causvid/critic.pt": "a critic",
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_a_files_name_is_a_hint_and_no_evidence(name, weights, tmp_path):
    """Nothing is imported because of a name, nor because nothing speaks against the base model."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"generator": prefixed(weights)}, path)
    assert_refused([path], tmp_path, re.escape(HINTS[name]), kind=None)
    if "none of them" in HINTS[name]:
        done = import_checkpoint([path], tmp_path / "model", kind="causal-forcing")
        assert f"the name {path.name} suggests an initialization" in done.lines[1]


def test_names_without_a_meaning_give_no_hint(weights, tmp_path):
    for name in ("model.pt", "ema_model.pt", "diffusion_pytorch_model.safetensors", "x.pt"):
        path = tmp_path / name
        (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
        assert_refused([path], tmp_path, r"name it with --model; known models: self-f", kind=None)


def test_a_lora_of_longlives_layout_is_not_longlives(weights, tmp_path):
    """Its code writes a 'generator_lora' for whoever trains with it."""
    message = r"name it with --model .*longlive_base.pt suggests longlive"
    assert_refused(LAYOUTS["longlive"](tmp_path, weights), tmp_path, message, kind=None)


def test_the_license_of_a_merged_lora_is_stated_too(weights, tmp_path):
    """Of the base it is recorded, of the LoRA nothing is."""
    base, adapter = LAYOUTS["longlive"](tmp_path, weights)
    path = tmp_path / "models" / base.name
    path.parent.mkdir()
    base.rename(path)
    record_fetched([path], "longlive", tmp_path)
    done = import_checkpoint([path, adapter], tmp_path / "model")
    assert done.folder.kind == "longlive"
    assert done.folder.origins == (
        Origin("transformer", PUBLISHED["longlive"].source, LICENSE),
        Origin("LoRA lora.pt", "", UNKNOWN),
    )


@pytest.mark.parametrize(
    "changes", [{"source": "somebody/else"}, {"revision": ""}, {"source": "gdhe17/self-forcing"}]
)
def test_a_record_of_another_origin_is_no_evidence(changes, weights, tmp_path):
    """Of another repository; of a folder that was copied, of which nothing was known."""
    path = tmp_path / "checkpoints" / "self_forcing_dmd.pt"
    [file] = self_forcing(tmp_path, weights)
    path.parent.mkdir()
    file.rename(path)
    record_fetched([path], "self-forcing", tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    for entry in record.values():
        entry |= changes
    (tmp_path / RECORD).write_text(json.dumps(record))
    assert_refused([path], tmp_path, r"--model .*suggests self-forcing", kind=None)


def test_a_folder_of_unknown_origin_is_fetched_without_a_license(weights, tmp_path):
    """A file at the published path is not the published file. The command says which it is."""
    path = tmp_path / "stick" / "checkpoints" / "self_forcing_dmd.pt"
    path.parent.mkdir(parents=True)
    torch.save(prefixed(weights), path)
    offer = look_up("self-forcing", tmp_path / "out", tmp_path / "stick")
    assert offer.license == UNKNOWN
    fetch(offer, tmp_path / "out", tqdm)
    assert next_commands(offer, tmp_path / "out")[-1].endswith(
        "--model self-forcing --out self-forcing"
    )
    copy = tmp_path / "out" / "checkpoints" / "self_forcing_dmd.pt"
    assert_refused([copy], tmp_path, "--model .*suggests self-forcing", kind=None)
    done = import_checkpoint([copy], tmp_path / "model", kind="self-forcing")
    assert [origin.license for origin in done.folder.origins] == [UNKNOWN]


def test_an_entry_can_be_chosen(weights, tmp_path):
    [path] = self_forcing(tmp_path, weights)
    import_checkpoint([path], tmp_path / "model", kind="self-forcing", entry="generator")
    copied = imported(tmp_path / "model")["transformer.head.head.bias"]
    assert copied.equal(weights["head.head.bias"] + 1)


def wan_vae_file(folder, tensors, naming=wan_vae_name):
    """As Wan publishes it, one torch checkpoint; or with diffusers' names in its folder."""
    if naming is wan_vae_name:
        return save(folder / "Wan2.1_VAE.pth", {naming(n): t for n, t in tensors.items()})
    (folder / "vae").mkdir()
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder / "vae"


@pytest.mark.parametrize("naming", [wan_vae_name, str], ids=["Wan's names", "diffusers' names"])
def test_wans_autoencoder_is_recognized_by_its_tensors(naming, weights, wan_vae, tmp_path):
    """Names written down from the published checkpoint, which has 194 tensors."""
    if naming is wan_vae_name:
        named = {naming(name) for name in wan_vae}
        assert len(named) == 194 and {
            "conv1.weight", "conv2.bias", "encoder.conv1.weight", "decoder.head.2.weight",
            "encoder.downsamples.3.shortcut.weight", "encoder.downsamples.5.time_conv.weight",
            "encoder.downsamples.2.resample.1.weight", "encoder.middle.1.to_qkv.weight",
            "decoder.middle.2.residual.6.weight", "decoder.upsamples.4.shortcut.bias",
            "decoder.upsamples.7.time_conv.bias", "decoder.upsamples.11.resample.1.weight",
            "decoder.upsamples.14.residual.3.gamma", "decoder.head.0.gamma",
        } <= named  # fmt: skip
    files = [*self_forcing(tmp_path, weights), wan_vae_file(tmp_path, wan_vae, naming)]
    done = import_checkpoint(files, tmp_path / "model", kind="self-forcing")
    assert done.folder.config == with_autoencoder(model_config("self-forcing"), "wan")
    assert done.folder.autoencoder and done.tensors == 825 + 194
    assert "the autoencoder is wan-vae" in done.lines
    assert done.folder.origins[1] == Origin("autoencoder", "", UNKNOWN)
    copied = imported(tmp_path / "model")
    assert all(copied[f"autoencoder.{name}"].equal(tensor) for name, tensor in wan_vae.items())
    assert len(open_weights(done.folder.config, tmp_path / "model" / WEIGHTS)) == 825 + 194


def test_a_damaged_autoencoder_is_refused_by_name(weights, wan_vae, tmp_path):
    damaged = dict(wan_vae)
    del damaged["decoder.conv_in.weight"], damaged["encoder.mid_block.resnets.0.norm1.gamma"]
    damaged |= {"decoder.up_blocks.0.upsamplers.0.time_conv.bias": torch.zeros(3)}
    files = [*self_forcing(tmp_path, weights), wan_vae_file(tmp_path, damaged)]
    assert_refused(
        files, tmp_path,
        r"\(2 missing, 1 misshaped\): missing autoencoder.encoder.mid_block.resnets.0.norm1.gamma; "
        r"missing autoencoder.decoder.conv_in.weight; misshaped "
        r"autoencoder.decoder.up_blocks.0.upsamplers.0.time_conv.bias: \(3,\), not \(16,\)",
    )  # fmt: skip
    twice = {**wan_vae, "conv1.bias": wan_vae["quant_conv.bias"].clone()}
    path = wan_vae_file(tmp_path, twice, str)
    assert_refused([files[0], path], tmp_path, "holds .*twice, under two names")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mine.pth", {"vae": "taehv"}, "taehv"),
        ("mine.pth", {"vae": "lighttae"}, "lighttae"),
        ("taew2_1.pth", {}, "the name suggests taew2_1: --vae taehv"),
        ("lighttaew2_1.pth", {}, "the name suggests lighttaew2_1: --vae lighttae"),
        ("mine.pth", {}, "do not say which: name it with --vae"),
        ("taew2_1.pth", {"vae": "wan"}, "is not 'wan' by its tensors, but taehv or lighttae"),
    ],
)
def test_the_tiny_autoencoders_are_told_apart_by_the_caller(
    name, options, expected, weights, tiny_autoencoder, tmp_path
):
    shutil.copy(tiny_autoencoder, tmp_path / name)
    files = [*self_forcing(tmp_path, weights), tmp_path / name]
    if " " in expected:
        assert_refused(files, tmp_path, expected, **options)
    else:
        done = import_checkpoint(files, tmp_path / "model", kind="self-forcing", **options)
        assert done.folder.config == with_autoencoder(model_config("self-forcing"), expected)


@pytest.mark.parametrize(("part", "vae"), [("taew2_1", "taehv"), ("lighttaew2_1", "lighttae")])
def test_a_fetched_autoencoder_needs_no_option(part, vae, weights, tiny_autoencoder, tmp_path):
    """Its record says which it is, and its license; changed, it is refused."""
    [path] = (tmp_path / file for file in PARTS[part].files)
    tensors = torch.load(tiny_autoencoder, weights_only=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    record_fetched([path], part, tmp_path)
    files = [*self_forcing(tmp_path / "x", weights), path]
    done = import_checkpoint(files, tmp_path / "model", kind="self-forcing")
    assert done.folder.config == with_autoencoder(model_config("self-forcing"), vae)
    assert f"the autoencoder is {part}" in done.lines
    assert done.folder.origins == (
        Origin("transformer", "", UNKNOWN),
        Origin("autoencoder", PARTS[part].source, LICENSE),
    )
    shutil.rmtree(tmp_path / "model")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_refused(files, tmp_path, "damaged or was replaced")


def test_two_autoencoders_are_refused(weights, wan_vae, tiny_autoencoder, tmp_path):
    files = [*self_forcing(tmp_path, weights), tiny_autoencoder, wan_vae_file(tmp_path, wan_vae)]
    assert_refused(files, tmp_path, "are two autoencoders: name one")

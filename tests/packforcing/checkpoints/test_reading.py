"""Damaged, unsafe and foreign checkpoint files."""

import os
import pickle
import zipfile
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from packforcing import MODELS, model_config
from packforcing.checkpoints.convert import import_checkpoint
from tests.packforcing.checkpoints.layouts import (
    CASES,
    assert_refused,
    base_diffusers_sharded,
    base_original,
    causvid,
    packforcing_unofficial,
    prefixed,
    save,
    self_forcing,
    wan_shapes,
)


class Code:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_first_ten_mismatched_tensors_are_named(weights, tmp_path):
    damaged = dict(weights)
    for layer in range(8):
        del damaged[f"blocks.{layer}.norm3.bias"]
    damaged["blocks.0.img_emb.weight"] = torch.zeros(2)
    damaged |= {f"blocks.{layer}.ffn.0.weight": torch.zeros(3, 24) for layer in range(4)}
    path = save(tmp_path / "self_forcing_dmd.pt", {"generator_ema": prefixed(damaged)})
    assert_refused(
        [path], tmp_path,
        r"8 missing, 1 unexpected, 4 misshaped.*missing transformer.blocks.0.norm3.bias.*"
        r"unexpected transformer.blocks.0.img_emb.weight; misshaped transformer.blocks.0.ffn.0"
        r".weight: \(3, 24\), not \(16, 24\) and 3 more$",
    )  # fmt: skip


@pytest.mark.parametrize("layout", [self_forcing, base_original])
def test_a_truncated_file_is_refused(layout, weights, tmp_path):
    [path] = layout(tmp_path, weights)
    whole = path.read_bytes()
    messages = "cut off", "cut off", "damaged", "is empty"
    for size, message in zip((len(whole) // 2, 100, 3, 0), messages, strict=True):
        path.write_bytes(whole[:size])
        assert_refused([path], tmp_path, rf"{path.name}.* {message}.*: download it again$")


def test_a_pickle_with_code_is_refused_and_not_run(weights, tmp_path):
    marker = tmp_path / "was-run"
    content = {"generator_ema": prefixed(weights), "config": Code(marker)}
    path = save(tmp_path / "self_forcing_dmd.pt", content)
    assert_refused([path], tmp_path, r"would run code when loaded \((posix|nt).mkdir\)")
    path.write_bytes(pickle.dumps(content))
    assert_refused([path], tmp_path, "is a bare pickle")
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert_refused([path], tmp_path, "is a bare pickle")
    assert not marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"R.",  # calls, with nothing to call
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR.",
        b"ctorch._utils\n_rebuild_parameter\n(K\x01K\x02K\x03tR.",
        b"ccollections\nOrderedDict\n(K\x01tR.",
        b"ctorch\nSize\n(X\x01\x00\x00\x00atR.",
        b"K\x01Q.",  # a storage whose name is a number
        b"}(]K\x01u.",  # a list as a key
    ],
)
def test_pickles_of_other_programs_are_refused(pickled, tmp_path):
    """Within what torch may call, with arguments that it does not take."""
    whole, path = save(tmp_path / "whole.pt", {"a": torch.zeros(2)}), tmp_path / "odd.pt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            content = b"\x80\x02" + pickled if name.endswith("data.pkl") else source.read(name)
            copy.writestr(name, content)
    assert_refused(
        [path], tmp_path, "cannot read .*odd.pt, which is damaged or not a torch checkpoint"
    )


def test_foreign_files_and_indices_are_refused(tmp_path):
    save_file({"decoder.upsamples.foo.x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    assert_refused(
        [tmp_path / "odd.safetensors"], tmp_path, "of neither a transformer.*upsamples.foo"
    )
    index = tmp_path / "deep.safetensors.index.json"
    index.write_text("[" * 100_000)
    assert_refused([index], tmp_path, "is not the index of a sharded checkpoint")


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[layout.__name__ for _, layout in CASES])
def test_every_damage_to_every_layout_is_refused_by_name(kind, layout, tmp_path, monkeypatch):
    """With two layers, as two have every kind of tensor."""
    config = msgspec.structs.replace(model_config(kind), layers=2)
    monkeypatch.setitem(MODELS, kind, config)
    whole = {name: torch.ones(shape) for name, shape in wan_shapes(24, 16, 24, 8, 2).items()}
    lacking = {name: tensor for name, tensor in whole.items() if name != "blocks.1.norm3.bias"}
    misshaped = whole | {"blocks.1.modulation": torch.ones(1, 5, 24)}
    images = whole | {"blocks.1.cross_attn.k_img.weight": torch.ones(24, 24)}  # image to video
    for number, (weights, message) in enumerate((
        (lacking, r"\(1 missing\): missing transformer.blocks.1.norm3.bias"),
        (misshaped, r"\(1 misshaped\): misshaped transformer.blocks.1.modulation: \(1, 5, 24\)"),
        (images, r"\(1 unexpected\): unexpected transformer.blocks.1.cross_attn.k_img.weight"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_refused(layout(folder, weights), tmp_path, message, kind=kind)

    (tmp_path / "whole").mkdir()
    files = layout(tmp_path / "whole", whole)
    pack, wrong = "packforcing-unofficial", r"has no entry 'generator_ema'|8 missing.*pack_compr"
    if kind == pack:  # without an entry of a name, which is the base model's
        pack, wrong = "wan2.1-t2v-1.3b", "is divided into 'generator', 'generator_ema'"
    monkeypatch.setitem(MODELS, pack, msgspec.structs.replace(model_config(pack), layers=2))
    assert_refused(files, tmp_path, wrong, kind=pack)
    for path in (tmp_path / "whole").rglob("*.*"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert_refused(
            files,
            tmp_path,
            rf"{path.name}.*(is cut off|which is damaged|is not the index)",
            kind=kind,
        )
        marker = tmp_path / "was-run"
        if path.suffix != ".json":
            torch.save({"generator": {"model.head": torch.ones(2)}, "step": Code(marker)}, path)
            assert_refused(files, tmp_path, rf"{path.name} would run code when loaded", kind=kind)
        assert not marker.exists()
        path.write_bytes(content)
    import_checkpoint(files, tmp_path / "model", kind=kind)


def test_a_header_length_that_looks_like_a_pickle_is_safetensors(weights, tmp_path):
    """safetensors begins with its header's length, whose first byte may be a pickle's."""
    path = tmp_path / "model.safetensors"
    for padding in range(0, 256, 8):
        save_file(weights, path, {"padding": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    done = import_checkpoint([path], tmp_path / "model", kind="wan2.1-t2v-1.3b")
    assert path.read_bytes()[:1] == b"\x80" and done.tensors == 825


def test_a_missing_shard_is_named(weights, tmp_path):
    [index] = base_diffusers_sharded(tmp_path, weights)
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    assert_refused([index], tmp_path, "not beside it: diffusion_pytorch_model-00002-of-00003")
    assert_refused([tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors"], tmp_path,
            "comes in 3 shards, and these are missing: 00002, 00003")  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (self_forcing, {"kind": "sora"}, "unknown kind of model 'sora'; known: self-forcing, "),
        (self_forcing, {"kind": "wan2.1-t2v-1.3b"}, "is divided into 'generator', "),
        (self_forcing, {"kind": "packforcing-unofficial"}, "8 missing.*pack_compressor.net.0"),
        (packforcing_unofficial, {"kind": "self-forcing"}, "8 unexpected.*pack_compressor.net.0"),
        (self_forcing, {"kind": "longlive"}, "longlive_base.pt with models/lora.pt merged"),
        (causvid, {"kind": "self-forcing"}, "no entry 'generator_ema', .* 'generator', 'critic'"),
        (self_forcing, {"entry": "ema"}, "no entry 'ema'"),
        (base_original, {"kind": "causvid", "entry": "generator"}, "no entry 'generator'"),
    ],
)
def test_a_wrong_kind_or_entry_is_refused(layout, options, message, weights, tmp_path):
    assert_refused(layout(tmp_path, weights), tmp_path, message, **options)


def test_files_that_hold_no_model_or_the_same_twice_are_refused(
    weights, tiny_autoencoder, tmp_path
):
    assert_refused([tmp_path / "none.pt"], tmp_path, "there is no file")
    (tmp_path / "empty").mkdir()
    assert_refused([tmp_path / "empty"], tmp_path, "holds no .safetensors file")
    assert_refused([tiny_autoencoder], tmp_path, "holds a transformer: name its checkpoint too")
    [path] = self_forcing(tmp_path, weights)
    assert_refused([path, path], tmp_path, "is named twice")
    copy = save(tmp_path / "copy.pt", torch.load(path, weights_only=True))
    assert_refused([path, copy], tmp_path, "both .* hold ")
    text = save(tmp_path / "t5.pt", {"token_embedding.weight": torch.zeros(2)})
    assert_refused([path, text], tmp_path, "of neither a transformer.*token_embedding.weight")
    for content in ([1, 2], {"state": {0: torch.zeros(2)}}):
        assert_refused([save(tmp_path / "odd.pt", content)], tmp_path, "holds no named tensors")
    wide = {name: tensor.double() for name, tensor in weights.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    assert_refused(
        [tmp_path / "wide.safetensors"], tmp_path, "as F64; only F32, F16, BF16 can be read"
    )

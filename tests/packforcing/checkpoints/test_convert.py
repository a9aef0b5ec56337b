"""Published checkpoints to model folders, and from there to a video."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from packforcing import MODELS
from packforcing.app.cli import main
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.fetch import RECORD
from packforcing.checkpoints.published import (
    DESCRIPTION,
    PUBLISHED,
    WEIGHTS,
)
from packforcing.config import Precision
from packforcing.embeddings import Embedding, save_embedding
from packforcing.errors import OutputError
from packforcing.model import load_model, random_weights
from packforcing.presets import policies
from packforcing.reference import rollout
from packforcing.runtime.backends import open_backend
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import draw_noise
from tests.helpers import frames_of
from tests.packforcing.checkpoints.layouts import (
    LAYOUTS,
    TINY,
    assert_refused,
    base_original,
    imported,
    longlive,
    record_fetched,
    run_command,
    self_forcing,
    wan_shapes,
)


@pytest.mark.parametrize("layers", [1, pytest.param(30, marks=pytest.mark.full)])
def test_an_imported_checkpoint_exports_and_renders_training_free(
    layers, tiny_autoencoder, tmp_path, monkeypatch
):
    """Self-Forcing's file under PackForcing's policy: the runtime gives what the reference does
    on the weights in the file, and what is read has gone through the low branch. The prompts are
    the demo's: UMT5 would be larger than all else here."""
    config = msgspec.structs.replace(MODELS["self-forcing"], layers=layers, text_encoder="words")
    monkeypatch.setitem(MODELS, "self-forcing", config)
    drawn = random_weights(config, seed=5)
    weights = {
        name.removeprefix("transformer."): drawn[name]
        for name in drawn
        if name.startswith("transformer.")
    }
    files = [*self_forcing(tmp_path, weights), tiny_autoencoder]
    named = "--model", "self-forcing", "--vae", "taehv"
    run_command("import-checkpoint", *files, *named, "--out", tmp_path / "model")
    bundle = tmp_path / "bundle"
    stated = run_command("export", "--weights", tmp_path / "model", "--out", bundle)
    assert "compressed" not in stated  # its own policy keeps a window
    stated = run_command("render", "a red star", "--bundle", bundle, "--policy", "packforcing",
                 "--seconds", 0.5, "--out", tmp_path / "star.mp4")  # fmt: skip
    assert "no compressor: past blocks are compressed training-free" in stated

    manifest = read_manifest(bundle)
    assert manifest.config == config
    policy = msgspec.structs.replace(policies(config)["packforcing"], sink=1, mid=2, recent=1)
    config = msgspec.structs.replace(  # and CausVid's schedule, with another for the first block
        config, policy=policy, timesteps=(1000, 522), first_timesteps=(1000, 757, 522),
        warp=False, shift=8.0,
    )  # fmt: skip
    model = load_model(config, tmp_path / "model" / WEIGHTS)
    assert model.transformer.state_dict()["head.head.weight"].equal(weights["head.head.weight"])
    text = np.random.default_rng(0).standard_normal((1, 4, 24), np.float32)
    backend = open_backend("onnxruntime", bundle, manifest, config, 1)
    runtime = Rollout(config, backend)
    runtime.begin(text, 6, seed=9)
    noise = partial(draw_noise, config, 9)
    for block in rollout(model, torch.from_numpy(text), 6, noise, seed=9):
        assert sorted(runtime.cache.mids) == block.read
        runtime.next_block()
        pixels = runtime.buffers.pixels.host[0]
        np.testing.assert_allclose(pixels, block.frames.numpy(), atol=1e-3)
    assert len(block.read) == 2 and block.frames.std() > 0.01
    backend.close()


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind, row in PUBLISHED.items() if not row.refused])
def test_every_layout_exports_and_renders(kind, tiny_autoencoder, tmp_path, monkeypatch):
    """With every one of its layers; under its own policy and under PackForcing's."""
    config = msgspec.structs.replace(MODELS[kind], text_encoder="words")
    monkeypatch.setitem(MODELS, kind, config)
    shapes = wan_shapes(24, 16, 24, 8, config.layers)
    whole = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    model, bundle, out = tmp_path / "model", tmp_path / "bundle", tmp_path / "star.mkv"
    run_command(
        "import-checkpoint",
        *LAYOUTS[kind](tmp_path, whole),
        tiny_autoencoder,
        "--out",
        model,
        "--model",
        kind,
        "--vae",
        "taehv",
    )
    run_command("export", "--weights", model, "--out", bundle)
    frames = 6 * config.block_pixel_frames
    result = "a red star", "--bundle", bundle, "--seconds", frames / config.fps, "--out", out
    for policy in ((), ("--policy", "packforcing")):
        did = json.loads(run_command("render", *result, "--json", *policy))
        assert did["frames"] == frames
        assert did["training_free"] == (bool(policy) or config.policy.mid > 0)
        pixels = frames_of(out)
        assert len(pixels) == frames and pixels.std() > 0.01 * 255


@pytest.mark.full
def test_the_commands_for_an_8_gb_gpu_lead_to_a_video(tiny_autoencoder, tmp_path, monkeypatch):
    """Those of docs/checkpoints.md, in order, with two layers in fp16. What the hub and UMT5 would
    give is here already, ONNX Runtime stands for the card, and engines are not built: the builder
    takes no matrices as narrow as these, and the real ones are `test_engines`'s."""
    precision = Precision(compute="fp16", weights="fp16", cache="fp16")
    config = msgspec.structs.replace(MODELS["self-forcing"], layers=2, precision=precision)
    monkeypatch.setitem(MODELS, "self-forcing", config)
    monkeypatch.chdir(tmp_path)
    whole = {name: 0.2 * torch.randn(shape) for name, shape in wan_shapes(24, 16, 24, 8, 2).items()}
    self_forcing(tmp_path, whole)
    (tmp_path / "downloads" / "taew2_1").mkdir(parents=True)
    shutil.copy(tiny_autoencoder, "downloads/taew2_1")
    record_fetched([Path("downloads/taew2_1/taew2_1.pth")], "taew2_1", Path("downloads/taew2_1"))
    text = np.random.default_rng(0).standard_normal((3, config.text_dim), np.float32)
    save_embedding("cat.safetensors", Embedding(text, "a cat walks on the beach", "umt5", "0" * 64))
    Path("prompts.txt").write_text("cat.safetensors\n")

    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    section = page.partition("on an 8 GB GPU\n")[2].partition("\n## ")[0]
    (lines,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    commands = [shlex.split(line)[1:] for line in lines.replace("\\\n", "").splitlines()
                if line.startswith("packforcing ")]  # fmt: skip
    assert len(commands) == 11
    for name, *args in commands:
        if name in ("fetch", "encode-prompt", "build"):
            main.get_command(None, name).make_context(name, args)  # parses, does not run
        else:
            here = {"tensorrt-rtx": "onnxruntime", "320x192": "80x112", "60": "4"}
            run_command(name, *(here.get(arg, arg) for arg in args))
    bundle = read_manifest("eight")
    assert bundle.config.precision == msgspec.structs.replace(precision, cache="int8")
    assert bundle.config.policy == policies(config)["packforcing"]
    assert len(frames_of(Path("cat.mp4"))) == 4 * config.fps


def test_the_command_reports_each_file(weights, tmp_path):
    files = longlive(tmp_path, weights)
    output = run_command(
        "import-checkpoint", *files, "--model", "longlive", "--out", tmp_path / "model"
    )
    for part in (
        "longlive_base.pt: transformer, 825 tensors of 'generator', torch checkpoint",
        "lora.pt: LoRA, 1200 tensors, torch checkpoint",
        "lora.pt: LoRA merged into 300 weights at scale 1; assumed for 300 modules: they have",
        "; not applied: 600 tensors like critic_lora.base_model.model.blocks.0.self_attn.q.lora_A",
        "longlive (by --model), 825 tensors",
        "license of the weights: unknown: nothing recorded says where the file is from",
        "no autoencoder: export needs",
    ):
        assert part in output
    result = CliRunner().invoke(
        main, ["export", "--weights", str(tmp_path / "model"), "--out", str(tmp_path / "b")]
    )
    assert (result.exit_code, result.stdout) == (2, "") and "no autoencoder" in result.stderr
    output = run_command(
        "import-checkpoint", *base_original(tmp_path, weights), "--out", tmp_path / "base",
        "--model", "wan2.1-t2v-1.3b",
    )  # fmt: skip
    assert "weights only, wan2.1-t2v-1.3b cannot be rendered" in output
    table = json.loads(run_command("models", "--json"))
    assert set(table) == set(PUBLISHED) and table["longlive"]["config"]["shift"] == 5
    assert all(kind in run_command("models") for kind in PUBLISHED)


def test_a_folder_that_is_not_empty_is_refused(weights, tmp_path):
    [path] = self_forcing(tmp_path, weights)
    (tmp_path / "model").mkdir()
    import_file = partial(import_checkpoint, [path], kind="self-forcing")
    import_file(tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    with pytest.raises(OutputError, match="null"):
        import_file(f"{tmp_path}/a\0b")
    with pytest.raises(OutputError, match="choose a new or an empty one"):
        import_file(tmp_path / "model")
    assert {entry.name for entry in tmp_path.iterdir()} == {"self_forcing_dmd.pt", "model"}


def test_mixed_dtypes_are_kept_and_aligned(weights, tiny_autoencoder, tmp_path):
    """The autoencoder's three 2-byte biases do not put 4-byte values off their alignment."""
    mixed = {name: t.bfloat16() if t.ndim == 1 else t for name, t in weights.items()}
    shutil.copy(tiny_autoencoder, tmp_path / "a-taew2_1.pth")
    save_file(mixed, tmp_path / "b.safetensors")
    files = [tmp_path / "a-taew2_1.pth", tmp_path / "b.safetensors"]
    import_checkpoint(files, tmp_path / "model", kind="self-forcing", vae="taehv")
    copied = imported(tmp_path / "model")
    assert all(copied[f"transformer.{name}"].equal(tensor) for name, tensor in mixed.items())
    with (tmp_path / "model" / WEIGHTS).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    del header["__metadata__"]
    for entry in header.values():
        assert 8 * (8 + length + entry["data_offsets"][0]) % int(entry["dtype"][-2:]) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak from there")
def test_memory_stays_below_the_largest_shard_and_a_third(tmp_path):
    """Four shards of 70 MB: a copy of the whole, or all of them mapped, would take 280 MB."""
    kind, layers, widths = "wan2.1-t2v-1.3b", 4, {"small": (24, 16), "large": (512, 14000)}
    for folder, (dim, ffn) in widths.items():
        (tmp_path / folder).mkdir()
        shapes = wan_shapes(dim, ffn, 24, 8, layers)
        for shard in range(layers):
            part = {
                name: torch.zeros(shape)
                for name, shape in shapes.items()
                if f"blocks.{shard}." in name or (shard == 0 and "blocks." not in name)
            }
            save_file(part, tmp_path / folder / f"{shard}.safetensors")
    program = f"""
import re
from pathlib import Path
import msgspec
from packforcing import MODELS
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.published import published_config
from packforcing.config import Precision
peaks = []
for folder, (dim, ffn) in {widths}.items():  # the small one first: what all imports have in common
    sizes = {TINY} | dict(dim=dim, ffn_dim=ffn, layers={layers})
    MODELS[{kind!r}] = msgspec.structs.replace(published_config({kind!r}), **sizes)
    import_checkpoint([folder], folder + "-model", kind={kind!r})
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
print(1024 * (peaks[1] - peaks[0]))
"""
    root = str(Path(__file__).parents[3])
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    largest = max(file.stat().st_size for file in (tmp_path / "large").iterdir())
    assert largest > 60e6 and int(result.stdout) < 1.3 * largest
    assert len(imported(tmp_path / "large-model")) == len(shapes)


def test_a_fetched_file_is_compared_with_its_record(weights, tmp_path):
    """One bit of a weight, which nothing else would notice; and the license that was shown."""
    [path] = self_forcing(tmp_path, weights)
    license_name = "cc-by-nc-sa-4.0, says its model card"
    output = {"source": "team/model", "revision": "", "licence": license_name}
    content = path.read_bytes()
    output |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / RECORD).write_text(json.dumps({path.name: output}))
    import_checkpoint([path], tmp_path / "first", kind="self-forcing")
    folder = json.loads((tmp_path / "first" / DESCRIPTION).read_text())
    assert folder["origins"] == [
        {"part": "transformer", "source": "team/model", "license": license_name}
    ]
    with path.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes([content[len(content) // 2] ^ 1]))
    assert_refused([path], tmp_path, "is damaged")

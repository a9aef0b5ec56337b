"""How the files beside this script were made: a record, not to be run again.

It runs with the code that it names, commit fb1f61a, the last before the package was divided into
six rooms: files of an old format come from old code, or they prove nothing. The next change of a
format adds files of its own under new names, with a script like this one, and these stay.

    git worktree add ../old fb1f61a && cp tests/formats/make_formats.py ../old
    cd ../old && PYTHONPATH=$PWD python make_formats.py OUT

    bundle-3/               schema version 3, ONNX graphs of a model with random weights
      engines/tensorrt-rtx/ engine records of version 1; the engines themselves are a line of text
    frames-3.npy            the first blocks that it rendered, 8 x 8 pixels averaged
    render-2/               version 2: a render with a cut, stopped after a block that follows a
                            checkpoint, so that it has latents, archives, a sink and segments
    fetched-1/              what `fetch` leaves: a file and the record of it
    model-1/                what `import-checkpoint` makes
    statistics-1.safetensors, embedding-1.safetensors
"""

import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from packforcing import MODELS, Config, Policy
from packforcing.calibration.statistics import calibrate
from packforcing.checkpoints import import_checkpoint
from packforcing.config import AUTOENCODERS, Precision
from packforcing.embeddings import Embedding, save_embedding
from packforcing.errors import RenderStopped
from packforcing.export.bundle import export_bundle
from packforcing.fetch import fetch, look_up
from packforcing.model import random_model, random_weights
from packforcing.models import published_config
from packforcing.prompts import Switch, encode
from packforcing.runtime import Session
from packforcing.runtime.bundle import file_record, read_manifest
from packforcing.runtime.engines import (
    EngineRecord,
    Key,
    encode_record,
    engine_file,
    graph_files,
    record_file,
    shapes,
)
from packforcing.runtime.estimate import CARD

PROMPT = "a red star over navy stripes"
SCENES = [Switch(0, PROMPT), Switch(1.2, "a white circle over sand dots", "cut")]

CONFIG = Config(
    name="formats", height=64, width=96, fps=8, dim=24, heads=2, layers=2, ffn_dim=32, freq_dim=8,
    block_frames=3, text_encoder="words", text_len=6, text_dim=22, compressor_widths=(4, 4, 4, 4),
    latent_channels=4, vae_encoder_width=4, vae_decoder_widths=(4, 4, 4, 4), sampler="renoise",
    policy=Policy(sink=1, mid=2, recent=1, mid_span=2.5),
)  # fmt: skip


def seeded_model():
    """A model with weights of a scale at which every part of it matters."""
    model, rng = random_model(CONFIG), np.random.Generator(np.random.Philox(7))
    for part in model.parts().values():
        state = part.state_dict()
        for name, tensor in state.items():
            values = rng.standard_normal(tensor.shape, dtype=np.float32)
            scale = (tensor.numel() / tensor.shape[0]) ** -0.5 if tensor.ndim > 1 else 0.1
            state[name] = torch.from_numpy(values * np.float32(scale)) + (tensor.ndim == 1)
        part.load_state_dict(state)
    return model


def make_bundle(out: Path) -> Path:
    bundle = out / "bundle-3"
    export_bundle(CONFIG, seeded_model().weights(), bundle)
    manifest = read_manifest(bundle)
    for graph in CARD:
        calls, engine = shapes(CONFIG, graph), engine_file(bundle, "tensorrt-rtx", graph)
        engine.parent.mkdir(parents=True, exist_ok=True)
        engine.write_text(f"This stands for an engine of {graph}.\n")
        key = Key(
            graph=graph_files(manifest, graph), tool="tensorrt-rtx 1.7.1.116",
            targets=("sm86", "sm89"), shapes=calls, length="input" if graph == "denoiser" else None,
        )  # fmt: skip
        record = EngineRecord(
            key=key, file=file_record(engine), weights=123_456, scratch=dict.fromkeys(calls, 4096),
            seconds=1.5, peak_memory=1 << 30,
        )  # fmt: skip
        record_file(bundle, "tensorrt-rtx", graph).write_bytes(encode_record(record))
    return bundle


def make_render(out: Path, bundle: Path) -> None:
    with Session.open(bundle, threads=1) as session:
        frames = np.concatenate(list(session.stream(PROMPT, 4.0, 5)))
        cells = frames.reshape(len(frames), 64 // 8, 8, 96 // 8, 8, 3).mean((2, 4))
        np.save(out / "frames-3.npy", cells.round().astype(np.uint8))

        def stop(info):
            if info.index == 6:
                session.stop()

        with suppress(RenderStopped):
            session.render(SCENES, 15, out / "film.mp4", 5, on_block=stop, checkpoint_seconds=3.0)
    (out / "film.mp4.render").rename(out / "render-2")
    (out / "render-2" / "lock").unlink(missing_ok=True)


def make_model(out: Path) -> None:
    """By way of `fetch`, from a folder laid out as the repository is."""
    sizes = {
        "height": 64, "width": 96, "dim": 24, "heads": 2, "ffn_dim": 16, "freq_dim": 8,
        "layers": 2, "text_len": 4, "text_dim": 24, "vae_strips": 1, "precision": Precision(),
        "vae_encoder_width": 4, "vae_decoder_widths": (4, 4, 4, 4),
    }  # fmt: skip
    AUTOENCODERS["lighttae"] = {name: sizes[name] for name in sizes if name.startswith("vae_")}
    config = msgspec.structs.replace(published_config("self-forcing"), **sizes, vae="lighttae")
    MODELS["self-forcing"] = msgspec.structs.replace(config, vae="taehv")
    torch.manual_seed(3)
    parts: dict[str, dict[str, torch.Tensor]] = {"transformer": {}, "autoencoder": {}}
    weights = random_weights(config)
    for name in weights:
        part, _, rest = name.partition(".")
        parts[part][rest] = weights[name].half().contiguous()
    source = out / "source"
    source.mkdir()
    save_file(parts["transformer"], source / "self_forcing_dmd.safetensors")
    save_file(parts["autoencoder"], source / "lighttaew2_1.safetensors")
    fetch(look_up("lighttaew2_1", out / "fetched-1", source), out / "fetched-1", tqdm)
    files = [source / "self_forcing_dmd.safetensors", out / "fetched-1/lighttaew2_1.safetensors"]
    import_checkpoint(files, out / "model-1", kind="self-forcing", vae="lighttae")
    for path in [*source.iterdir(), out / "fetched-1" / ".lock"]:
        path.unlink(missing_ok=True)
    source.rmdir()


def main(out: Path) -> None:
    out.mkdir()
    bundle = make_bundle(out)
    make_render(out, bundle)
    make_model(out)
    prompts = [PROMPT, "a blue square over sand checks"]
    calibrate(bundle, prompts, out / "statistics-1.safetensors", seconds=2.0, seed=5)
    rows = encode(PROMPT, CONFIG)[0, :4]
    embedding = Embedding(rows, PROMPT, "words", "0" * 64)
    save_embedding(out / "embedding-1.safetensors", embedding)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

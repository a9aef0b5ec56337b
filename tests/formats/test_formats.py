"""Files of every format version that is still read, as the code of their time wrote them.

`make_formats.py` says how they were made. They are never made anew: a change of a format adds a
folder with the next number, and an upgrade, and these go on being opened.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import msgspec
import numpy as np
import onnxruntime
import pytest

import packforcing
from packforcing.checkpoints import fetch, published
from packforcing.embeddings import load_embedding
from packforcing.errors import PackForcingError
from packforcing.files import file_sha256, unseal_json
from packforcing.origins import UNKNOWN, Origin
from packforcing.prompts import Switch
from packforcing.runtime import Session, bundle, engine_records, render_record, resume
from tests.helpers import frames_of

HERE = Path(__file__).parent
PROMPT = "a red star over navy stripes"
SCENES = [Switch(0, PROMPT), Switch(1.2, "a white circle over sand dots", "cut")]

ORIGINS = (
    Origin("transformer", "gdhe17/Self-Forcing", "CC-BY-NC-SA-4.0"),
    Origin("autoencoder", "lightx2v/Autoencoders", "Apache-2.0"),
)

# kind of file: the module of its reader, with `UPGRADES`, and the name of its version there
FORMATS = {
    "bundle": (bundle, "SCHEMA_VERSION"),
    "engines": (engine_records, "VERSION"),
    "model": (published, "VERSION"),
    "render": (render_record, "VERSION"),
}


def files_of(kind: str) -> list[Path]:
    """The fixtures of a kind, those of the newest version last."""
    paths = sorted(HERE.glob("bundle-*/engines" if kind == "engines" else f"{kind}-*"))
    return sorted(paths, key=engine_version) if kind == "engines" else paths


def engine_version(engines: Path) -> int:
    """The version of engine records; a newer bundle may have older ones."""
    record = engines / "tensorrt-rtx" / "denoiser.json"
    return json.loads(unseal_json("engine", record.read_bytes())).get("version", 1)


def each(kind: str):
    return pytest.mark.parametrize("path", files_of(kind), ids=lambda path: path.name)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_version_that_is_read_has_a_file_here_and_an_upgrade(kind):
    module, name = FORMATS[kind]
    if kind == "engines":
        bodies = [unseal_json("engine", path.read_bytes()) for path in HERE.glob("*/*/*/*.json")]
    elif kind == "render":
        bodies = [
            unseal_json("checkpoint", path.joinpath("checkpoint.json").read_bytes())
            for path in files_of(kind)
        ]
    else:
        record = {"bundle": "manifest.json", "model": "model.json"}[kind]
        bodies = [path.joinpath(record).read_bytes() for path in files_of(kind)]
    field = "schema_version" if kind == "bundle" else "version"
    versions = {json.loads(body).get(field, 1) for body in bodies}
    assert versions == {*module.UPGRADES, getattr(module, name)}


@each("bundle")
def test_a_bundle_renders_its_frames(path):
    frames = np.load(HERE / f"frames-{path.name.removeprefix('bundle-')}.npy")
    with Session.open(path, threads=1) as session:
        stream = np.concatenate(list(session.stream(PROMPT, 4.0, 5)))
    count, height, width, _ = stream.shape
    means = stream.reshape(count, height // 8, 8, width // 8, 8, 3).mean((2, 4))
    assert frames.std() > 20  # a picture
    np.testing.assert_allclose(means, frames, atol=2)  # rounding differs between CPUs


DIGESTS = {  # as the releases of their time computed them: unfinished renders and jobs hold them
    "bundle-3": "56b6c45b9834af32bef97a040c7c2d74c950dd725c00905b52b4ac7db1e73928",
    "bundle-4": "a1b32d1d735107792e00176e9c5fa82fba87c29b4cdcf4596612e6badb1cce3d",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_renders_of_a_bundle_go_on_although_its_policy_and_precision_have_more_fields(name):
    manifest = bundle.read_manifest(HERE / name)
    assert bundle.bundle_digest(manifest) == DIGESTS[name]
    for part, change in (("policy", {"commit": "last-step"}), ("precision", {"attention": "fp8"})):
        other = msgspec.structs.replace(getattr(manifest.config, part), **change)
        config = msgspec.structs.replace(manifest.config, **{part: other})
        changed = msgspec.structs.replace(manifest, config=config)
        assert bundle.bundle_digest(changed) != DIGESTS[name]


def test_a_bundle_states_the_license_of_its_weights_since_version_4():
    origins = [bundle.read_manifest(path).origins for path in files_of("bundle")]
    one = Origin("model", "", "CC-BY-NC-SA-4.0")
    assert origins == [(), (one,), (one,), ORIGINS]


@each("bundle")
def test_engine_records_are_read_and_describe_the_engines(path):
    records = engine_records.read_records(path, "tensorrt-rtx")
    assert set(records) == {"denoiser", "compressor", "vae_decoder"}
    record = records["denoiser"]
    assert (record.weights, record.seconds, record.peak_memory) == (123_456, 1.5, 1 << 30)
    assert record.scratch == {"denoiser.block": 4096, "denoiser.compressed": 4096}
    assert record.key.tool == "tensorrt-rtx 1.7.1.116" and record.key.targets == ("sm86", "sm89")
    config = bundle.read_manifest(path).config
    assert record.key.shapes == engine_records.shapes(config, "denoiser")
    kinds = [entry.kind for entry in record.kernels if entry.call == "denoiser.block"]
    assert kinds == (["attention", "product"] if path.name == "bundle-5" else [])


@each("model")
def test_a_model_folder_exports(path, tmp_path):
    pytest.importorskip("torch")
    from packforcing.export import export_bundle
    from packforcing.model import open_weights

    folder = published.read_model_folder(path)
    assert folder.kind == "self-forcing"
    assert folder.origins[0] == Origin("transformer", "gdhe17/Self-Forcing", "CC-BY-NC-SA-4.0")
    license_name = "Apache-2.0" if path.name == "model-3" else UNKNOWN
    assert [origin.license for origin in folder.origins[1:]] == [license_name]
    export_bundle(folder.config, open_weights(folder.config, path / published.WEIGHTS), tmp_path)
    embedding = np.ones((2, folder.config.text_dim), np.float32)
    with Session.open(tmp_path) as session:
        assert sum(map(len, session.stream(embedding, 0.5))) == 8


# prompts and the archive's limit of each render, and the blocks that it has; each scene's first one
# is without the three frames that stand for time before it
LIMITED = PROMPT, 4, 8 * 12 - 3
RENDERS = {
    "render-2": (SCENES, None, 6 * 12 - 2 * 3), "render-2-limited": LIMITED, "render-3": LIMITED,
}  # fmt: skip


@each("render")
def test_an_interrupted_render_is_resumed(path, tmp_path, monkeypatch):
    """The libraries that decide about its frames are said to be those it was begun with."""
    shutil.copytree(path, tmp_path / "film.mp4.render")
    record = json.loads(path.joinpath("checkpoint.json").read_bytes())["checkpoint"]
    versions = dict(part.split() for part in record["request"]["made with"].split(", "))
    for module in (packforcing, onnxruntime, av):
        monkeypatch.setattr(module, "__version__", versions[module.__name__])
    with Session.open(HERE / "bundle-3", threads=1) as session:
        prompts, limit, frames_resumed = RENDERS[path.name]
        settings = {"seconds": 15, "seed": 5, "checkpoint_seconds": 3.0, "archive_limit": limit}
        alone = session.render(prompts, path=tmp_path / "alone.mp4", **settings)
        resumed = session.render(prompts, path=tmp_path / "film.mp4", resume=True, **settings)
    assert resumed.frames_resumed == frames_resumed
    assert (resumed.frames, resumed.blocks) == (alone.frames, alone.blocks) == (120, 11)
    frames, truth = frames_of(tmp_path / "film.mp4"), frames_of(tmp_path / "alone.mp4")
    assert sorted(left.name for left in tmp_path.iterdir()) == ["alone.mp4", "film.mp4"]
    assert len(frames) == 120
    np.testing.assert_allclose(frames.mean((1, 2)), truth.mean((1, 2)), atol=2)
    assert np.abs(frames.astype(int) - truth).mean() < 4  # levels; encoders differ


@pytest.mark.parametrize("path", files_of("statistics"), ids=lambda path: path.name)
def test_statistics_are_accepted(path, tmp_path):
    pytest.importorskip("onnx_ir")
    from packforcing.calibration.quantizer import quantize_bundle

    quantize_bundle(files_of("bundle")[-1], tmp_path, cache="int8", calibration=path)
    manifest = bundle.read_manifest(tmp_path)
    precision = manifest.config.precision
    assert manifest.origins == ORIGINS  # passed on
    assert (precision.weights, precision.cache) == ("fp32", "int8")
    if path.stem != "statistics-1":
        quantize_bundle(files_of("bundle")[-1], tmp_path, calibration=path, attention="fp8")
    with Session.open(tmp_path) as session:
        assert sum(map(len, session.stream(PROMPT, 1.0))) == 8


@pytest.mark.parametrize("path", files_of("embedding"), ids=lambda path: path.name)
def test_an_embedding_is_read(path):
    embedding = load_embedding(path)
    assert (embedding.prompt, embedding.encoder) == (PROMPT, "words")
    assert embedding.encoder_sha256 == "0" * 64
    # one row per word: red, star, navy and stripes
    np.testing.assert_array_equal(embedding.text.argmax(1), [0, 11, 12, 19])
    assert embedding.text.shape == (4, 22) and embedding.text.sum() == 4


@pytest.mark.parametrize("path", files_of("fetched"), ids=lambda path: path.name)
def test_a_record_of_fetched_files_is_read(path):
    (name, record), = fetch.read_record(path).items()  # fmt: skip
    assert record.sha256 == file_sha256(path / name)
    assert (record.source, record.license) == (
        "lightx2v/Autoencoders", "not read here: see the source before use"
    )  # fmt: skip
    assert fetch.recorded_file(path / name) == (name, record)


# What two later versions might change: a field, its value in the first and in the second of them,
# and how a reader shows it
CHANGES = {
    "bundle": ("tools", {"x": "1"}, {"x": "2"}, lambda path: bundle.read_manifest(path).tools),
    "engines": ("seconds", 10.0, 20.0, lambda path: denoiser_record(path).seconds),
    "model": ("made_from", ["1"], ["2"], lambda path: published.read_model_folder(path).made_from),
    "render": ("joined", False, True, resume.finished),
}


def denoiser_record(path: Path) -> engine_records.EngineRecord:
    record = engine_records.read_record(path, "tensorrt-rtx", "denoiser")
    assert record
    return record


@pytest.fixture(params=FORMATS)
def case(request, tmp_path):
    """A kind, its module, the names there, its version and a copy of its newest files."""
    kind = request.param
    newest = files_of(kind)[-1]
    newest = newest.parent if kind == "engines" else newest
    path = tmp_path / "film.mp4"
    shutil.copytree(newest, f"{path}.render" if kind == "render" else path)
    if kind == "render":
        path.touch()  # what a render that is finished leaves
    module, name = FORMATS[kind]
    return kind, module, name, getattr(module, name), path


def test_an_older_version_is_upgraded_step_by_step(case, monkeypatch):
    kind, module, name, today, path = case
    field, between, now, shown = CHANGES[kind]
    assert shown(path) not in (between, now) or kind == "render"
    bytes_before = {file: file.read_bytes() for file in path.parent.rglob("*.json")}

    def second(fields):
        assert fields[field] == between, "the steps come in order"
        return {**fields, field: now}

    monkeypatch.setattr(module, name, today + 2)
    upgrades = {today: lambda fields: {**fields, field: between}, today + 1: second}
    monkeypatch.setattr(module, "UPGRADES", upgrades)
    assert shown(path) == now
    if kind == "bundle":
        assert bundle.read_manifest(path).schema_version == today + 2
    # reading writes nothing
    assert {file: file.read_bytes() for file in path.parent.rglob("*.json")} == bytes_before


def test_a_newer_version_is_refused(case, monkeypatch):
    kind, module, name, today, path = case
    monkeypatch.setattr(module, name, today - 1)
    refused(
        kind, path, rf"{RECORDS[kind]} has (schema )?version {today}, this release reads "
        rf"{today - 1}: update packforcing, or {REMEDIES[kind]}",
    )  # fmt: skip


def test_an_older_version_without_an_upgrade_is_refused(case, monkeypatch):
    kind, module, name, today, path = case
    monkeypatch.setattr(module, name, today + 1)
    refused(
        kind, path, rf"{RECORDS[kind]} has (schema )?version {today}, this release reads "
        rf"{today + 1}: {REMEDIES[kind]}",
    )  # fmt: skip


def test_an_older_version_that_does_not_hold_what_it_should_is_damaged(case, monkeypatch):
    kind, module, name, today, path = case
    monkeypatch.setattr(module, name, today + 1)
    monkeypatch.setattr(module, "UPGRADES", {today: lambda fields: {"x": fields["absent"]}})
    refused(kind, path, f"{RECORDS[kind]} is damaged")


RECORDS = {
    "bundle": r"manifest\.json", "engines": r"denoiser\.json", "model": r"model\.json",
    "render": r"checkpoint\.json",
}  # fmt: skip
REMEDIES = {
    "bundle": "export the bundle again",
    "engines": "run 'packforcing build",
    "model": "import the checkpoint again",
    "render": r"finish it with the release that began it, or remove \S*film\.mp4\.render to",
}


def refused(kind: str, path: Path, message: str) -> None:
    with pytest.raises(PackForcingError, match=message) as caught:
        CHANGES[kind][-1](path)
    assert "\n" not in str(caught.value)

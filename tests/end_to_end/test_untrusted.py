"""Bundles, prompts and arguments from anybody: used as they are meant, or refused in one line."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packforcing import Config
from packforcing.app.cli import main
from packforcing.embeddings import load_embedding
from packforcing.errors import BackendError, BundleError, OutputError, PackForcingError, PromptError
from packforcing.files import file_record
from packforcing.prompts import read_schedule
from packforcing.runtime import bundle
from packforcing.runtime.allocations import memory_by_purpose
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.bundle import check_files, contract, graph_file, read_manifest
from packforcing.runtime.engine_records import read_records
from packforcing.runtime.request import check_request
from tests.emulated import build_engines
from tests.helpers import DAMAGES, TINY, link

FUZZ = pytest.mark.parametrize("examples", [60, pytest.param(2500, marks=pytest.mark.full)])


def fuzzed(examples: int, strategy: st.SearchStrategy, check) -> None:
    """Runs `check` on so many values; what it raises fails the test with the smallest of them."""
    quiet = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    quiet(given(strategy)(lambda value: check(value)))()


@pytest.fixture
def damaged(tiny_bundle, tmp_path):
    """A bundle of hard links, as a copy to damage: each file is replaced, never written into."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("cases", [40, pytest.param(500, marks=pytest.mark.full)])
def test_a_damaged_bundle_is_refused(tiny_bundle, tmp_path, cases):
    """Any file of it, manifest, engines and their records included: no byte is without a checksum
    or a meaning."""
    rng = random.Random(2)
    sound = Path(shutil.copytree(tiny_bundle, tmp_path / "sound"))
    build_engines(sound)
    files = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())
    records = read_records(sound, "tensorrt-rtx")
    for case in range(cases):
        folder = Path(shutil.copytree(sound, tmp_path / "a" / "bundle"))
        name = files[case % len(files)]
        damage = rng.choice(DAMAGES)
        damage(folder / name, folder / rng.choice([n for n in files if n != name]), rng)
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest)
            engine_records = read_records(folder, "tensorrt-rtx")
        except (BundleError, BackendError) as error:
            assert str(folder) in str(error)
        else:  # the same file, from elsewhere
            assert damage is link
            assert manifest == read_manifest(sound) and engine_records == records
        shutil.rmtree(tmp_path / "a")


def test_a_change_of_meaning_in_a_manifest_is_refused(damaged):
    path = damaged / "manifest.json"
    path.write_text(path.read_text().replace('"mid_span": 2.5', '"mid_span": 2.4'))
    with pytest.raises(BundleError, match=r"manifest\.json is damaged: its SHA-256 differs"):
        read_manifest(damaged)


@pytest.mark.parametrize("seal", ["", "0" * 64, None])
def test_a_manifest_without_its_own_checksum_is_damaged(damaged, seal):
    manifest = json.loads((damaged / bundle.MANIFEST).read_text())
    del manifest["sha256"]
    manifest |= {} if seal is None else {"sha256": seal}
    (damaged / bundle.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="its SHA-256 differs"):
        read_manifest(damaged)


@pytest.mark.parametrize("name", ["../prompt.onnx", "/etc/passwd", "..", "a/b", "a\0b", ""])
def test_a_manifest_names_files_of_its_folder_alone(damaged, name):
    manifest = read_manifest(damaged)
    files = {**manifest.files, name: manifest.files["prompt.onnx"]}
    bundle.write_manifest(damaged, msgspec.structs.replace(manifest, files=files))
    with pytest.raises(BundleError, match="not a file inside the bundle"):
        read_manifest(damaged)


def test_no_bundle_makes_it_read_what_is_endless(damaged):
    os.truncate(damaged / "prompt.onnx", 1 << 40)  # sparse: reading it would take hours
    with pytest.raises(BundleError, match="damaged"):
        check_files(damaged, read_manifest(damaged))
    (damaged / "prompt.onnx").unlink()
    (damaged / "prompt.onnx").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="is no file"):
        check_files(damaged, read_manifest(damaged))
    os.truncate(damaged / "manifest.json", 1 << 40)
    with pytest.raises(BundleError, match="larger than"):
        read_manifest(damaged)
    (damaged / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="damaged"):
        read_manifest(damaged)


@pytest.mark.parametrize("place", ["../secret", "{}/secret", "link", "inside/../../secret"])
def test_a_graph_reads_weights_from_its_own_folder_alone(damaged, tmp_path, place):
    """ONNX's external data could name any file, and a link in the folder lead to one."""
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    (damaged / "link").symlink_to(tmp_path / "secret")
    name = graph_file("prompt")
    model = onnx.load(damaged / name)
    weights = next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) > 64)
    size = len(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", place.format(tmp_path)), ("length", str(size))):
        weights.external_data.add(key=key, value=value)
    onnx.save(model, damaged / name)
    with pytest.raises(BackendError, match=r"cannot load .*xternal data"):
        OnnxGraph(damaged / name, contract(TINY)["prompt"], threads=1)
    manifest = read_manifest(damaged)
    files = {**manifest.files, name: file_record(damaged / name)}
    with pytest.raises(BundleError, match=r"reads weights from '.*', which the manifest"):
        check_files(damaged, msgspec.structs.replace(manifest, files=files))


def test_sizes_are_refused_before_anything_is_allocated():
    sizes = ("layers", "dim", "text_len", "text_dim", "height", "fps", "block_frames", "heads")
    for name in sizes:
        with pytest.raises(PackForcingError, match=name):
            msgspec.structs.replace(TINY, **{name: 1 << 40})
    with pytest.raises(PackForcingError, match=r"policy\.recent"):
        msgspec.structs.replace(TINY.policy, recent=1 << 40)
    with pytest.raises(PackForcingError, match="text_len x text_dim"):
        msgspec.structs.replace(TINY, text_len=1 << 16, text_dim=1 << 16)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "..", "/", "fp16", "int8", "denoiser", "N", "1e999", "\0"])
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)  # fmt: skip


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Where something stands in what JSON holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    paths = []
    for key, inner in items:
        paths.append((*path, key))
        if isinstance(inner, dict | list):
            paths += places(inner, (*path, key))
    return paths


def changed(value: object, changes: list[tuple[int, object]]) -> object:
    value = copy.deepcopy(value)
    for number, new in changes:
        known = places(value)
        *path, last = known[number % len(known)]
        holder = value
        for key in path:
            holder = holder[key]
        holder[last] = new
    return value


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), VALUES), min_size=1, max_size=3)


@FUZZ
def test_any_config_is_one_or_is_refused(examples):
    """One that is accepted can be planned with: sizes, tensors and bytes are counted in no time."""
    known = msgspec.to_builtins(TINY)

    def check(changes):
        try:
            config = msgspec.convert(changed(known, changes), Config, strict=True)
        except (msgspec.ValidationError, PackForcingError):
            return
        assert all(size >= 0 for size in memory_by_purpose(config).values())
        assert contract(config)["denoiser"].inputs

    fuzzed(examples, CHANGES, check)


@FUZZ
def test_any_manifest_is_one_or_is_refused(damaged, examples):
    path = damaged / "manifest.json"
    known = json.loads(path.read_text())

    def check(changes):
        path.write_text(json.dumps(changed(known, changes)))
        try:
            read_manifest(damaged)
        except BundleError:
            return
        assert json.loads(path.read_text()) == known

    fuzzed(examples, CHANGES, check)


WORDS = st.lists(
    st.sampled_from(["red", "star", "navy", "stripes", "the", "over", "\0", "\ud800", "ß", ","])
    | st.text(max_size=12),
    max_size=12,
).map(" ".join)
NUMBERS = st.integers() | st.floats()


@FUZZ
def test_any_request_is_one_or_is_refused(tmp_path, examples):
    """Prompts, lengths, seeds, embeddings, and schedules read from a file."""
    schedule, embedding = tmp_path / "a.toml", tmp_path / "a.safetensors"

    def check(request):
        prompt, seconds, seed, data = request
        schedule.write_text(
            f"[[switch]]\ntime = 0\nprompt = {json.dumps(prompt)}\n"
            f"[[switch]]\ntime = {seconds}\nprompt = 'a red star'\n",
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        embedding.write_bytes(data)
        for ask in (
            lambda: check_request(TINY, prompt, seconds, 0),
            lambda: check_request(TINY, "a red star", 1, seed),
            lambda: check_request(TINY, np.array([[seconds]]), 1, 0),
            lambda: check_request(TINY, read_schedule(schedule), 20, 0),
            lambda: check_request(TINY, load_embedding(embedding).text, 1, 0),
        ):
            try:
                ask()
            except PackForcingError as error:
                assert len(str(error)) < 2000

    header = st.dictionaries(st.sampled_from(["text", "a"]), VALUES).map(
        lambda value: (
            (text := json.dumps(value).encode()) and len(text).to_bytes(8, "little") + text
        )
    )
    data = header | st.binary(max_size=40)
    fuzzed(examples, st.tuples(WORDS, NUMBERS, st.integers(), data), check)


def test_an_endless_prompt_is_refused():
    with pytest.raises(PromptError, match="at most 10000 can be read"):
        check_request(TINY, "red " * 10_000, 1, 0)


@FUZZ
def test_any_command_line_ends_in_a_result_or_one_line(
    tiny_bundle, tmp_path, monkeypatch, examples
):
    """Nothing is rendered: a session that is asked for is a request that was found to be sound.
    Left out are the commands that work without any argument."""

    def session(*args, **kwargs):
        raise OutputError("it would have been rendered")

    monkeypatch.setattr("packforcing.app.cli.videos.open_session", session)
    monkeypatch.chdir(tmp_path)
    options = ("--seconds", "--seed", "--policy", "--threads", "--backend", "--out", "--start",
               "--embedding", "--resume", "--json", "--budget", "--size", "--history", "--gpu",
               "--target", "--precision", "--weight-dtype", "--cache-dtype", "--model",
               "--block-frames", "--help")  # fmt: skip
    values = (
        NUMBERS.map(str)
        | st.sampled_from(
            ["a.mp4", "a/", "sink-window", "sm89", "1,2,3", "64x96", "fp16,int8", "."]
        )
        | st.text(max_size=10)
    )

    def argument(text: str) -> str:
        """As a system can pass it: no null byte, and as surrogates only bytes that are no text."""
        return text.replace("\0", "").encode(errors="ignore").decode()

    word = (st.sampled_from(options) | values | WORDS).map(argument) | st.just("a \udcff")
    words = st.lists(word, max_size=6)

    def check(arguments):
        command, args = arguments
        first = ["--bundle", str(tiny_bundle), "--out", "a.mp4"] if command == "render" else []
        result = CliRunner().invoke(main, [command, *first, *args])
        assert result.exception is None or isinstance(result.exception, SystemExit), arguments
        assert result.exit_code in (0, 2)
        if result.exit_code == 2:
            assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1

    commands = st.sampled_from(
        ["render", "plan", "inspect", "demo", "models", "evaluate", "calibrate", "quantize",
         "import-checkpoint", "encode-prompt", "fetch"]
    )  # fmt: skip
    fuzzed(examples, st.tuples(commands, words), check)
    assert [path for path in tmp_path.rglob("*.mp4") if path.is_file()] == []

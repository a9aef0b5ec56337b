"""Engines: what they are built from, what must not be built, and that no partial one counts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import onnx
import psutil
import pytest
from filelock import FileLock
from onnx import TensorProto, helper, numpy_helper

from packforcing import model_config
from packforcing.config import Precision
from packforcing.errors import (
    BackendError,
    ConfigError,
    MissingDependency,
    OutputError,
    PackForcingError,
)
from packforcing.files import file_record
from packforcing.runtime.bundle import check_files, read_manifest, write_manifest
from packforcing.runtime.engine_records import (
    Key,
    check_engine,
    differences,
    engine_file,
    read_record,
    read_records,
    record_file,
)
from packforcing.runtime.estimate import scratch_bytes, weight_bytes
from packforcing.runtime.plan import CUDA_CONTEXT, build_bytes, estimates
from tests.emulated import Cuda

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, which builds without a GPU")

from packforcing.export import builder, engines
from tests.helpers import run, run_measured

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def built(tiny_half_bundle, tmp_path_factory) -> Path:
    """A bundle with engines, made by the command; not to be changed."""
    directory = shutil.copytree(tiny_half_bundle, tmp_path_factory.mktemp("built") / "bundle")
    result = build(directory)
    assert result.exit_code == 0, result.stderr
    return directory


@pytest.fixture
def bundle(tiny_half_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_half_bundle, tmp_path / "bundle"))


@pytest.fixture
def rebuilt(built, tmp_path) -> Path:
    """A bundle with engines, to be changed."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def build(*args: object):
    return run("build", *args)


def edit(directory: Path, graph: str, change) -> None:
    """Changes a graph, and the manifest so that it vouches for the change."""
    path = directory / f"{graph}.onnx"
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    manifest = read_manifest(directory)
    files = {**manifest.files, path.name: file_record(path)}
    write_manifest(directory, msgspec.structs.replace(manifest, files=files))


# What is built


def test_a_bundle_with_engines_and_its_records_pass_their_checks(built):
    check_files(built, read_manifest(built))
    records = read_records(built, RTX)
    assert list(records) == ["denoiser", "compressor", "vae_decoder"]
    assert not list((built / "engines" / RTX).glob(".*"))


def test_the_denoiser_has_a_profile_for_full_and_one_for_compressed_blocks(built):
    config = read_manifest(built).config
    record = read_records(built, RTX)["denoiser"]
    assert record.key.shapes == {
        "denoiser.block": {"N": config.block_tokens, "C": config.context_tokens},
        "denoiser.compressed": {"N": config.compressed_tokens, "C": config.context_tokens},
    }
    assert record.scratch["denoiser.block"] > record.scratch["denoiser.compressed"] > 0


def test_records_have_the_builder_s_sizes_under_the_names_of_the_plan(built):
    records = read_records(built, RTX)
    figures = {name: size for record in records.values() for name, size in record.figures.items()}
    assert figures.keys() == estimates(read_manifest(built).config).keys()
    for graph, record in records.items():
        weights = onnx.load(built / f"{graph}.onnx").graph.initializer
        stored = sum(numpy_helper.to_array(tensor).nbytes for tensor in weights)
        padding = 512 * len(weights)  # at most, of each tensor
        assert stored - padding < record.weights < stored + padding, graph
        memory, disk = engines.required_bytes(built / f"{graph}.onnx")
        assert record.file.bytes < record.peak_memory < memory
        assert record.file.bytes < disk
        assert record.file == file_record(engine_file(built, RTX, graph))


def test_records_have_the_dtypes_of_kernels_and_commands_show_them(built):
    config = read_manifest(built).config
    kernels = read_records(built, RTX)["denoiser"].kernels
    attention = [entry for entry in kernels if entry.kind == "attention"]
    assert [(entry.call, entry.operands, entry.count) for entry in attention] == [
        (call, ("fp16",) * 3, 2 * config.layers)  # over the context and over the text
        for call in ("denoiser.block", "denoiser.compressed")
    ]
    line = f"attention fp16 ({2 * config.layers}); product fp16 ("
    for command in ("inspect", built), ("plan", "--bundle", built):
        assert run(*command).stdout.count(line) == 2, command
    shown = json.loads(run("inspect", built, "--json").stdout)["kernels"]
    assert shown["denoiser.block"].startswith(line)


def test_json_has_a_record_per_engine(built):
    result = build(built, "--json")
    records = json.loads(result.stdout)["engines"]
    assert records == json.loads(msgspec.json.encode(read_records(built, RTX)))


# What is not built


def unplug(layers: int):
    def change(graph):
        nodes = [node for node in graph.node if "kv_len" in node.input]
        for node in nodes[:layers]:
            del node.input[3:]

    return change


@pytest.mark.parametrize("layers", [1, 2])
def test_a_denoiser_whose_kv_len_is_unplugged_is_refused(bundle, layers):
    edit(bundle, "denoiser", unplug(layers))
    result = build(bundle)
    assert result.exit_code == 2
    assert f"attention reads kv_len in {2 - layers} of 2 layers" in result.stderr
    assert not (bundle / "engines").exists()


def job(directory: Path, graph: str, **changes) -> builder.BuildJob:
    """The job of a child process, with absolute paths."""
    key, manifest = read_records(directory, RTX)[graph].key, read_manifest(directory)
    engine = engine_file(directory, RTX, graph).with_suffix(".new")
    result = engines.build_job(manifest, RTX, graph, key, engine)
    return msgspec.structs.replace(result, graph=str(directory / result.graph), **changes)


def test_a_build_that_drops_kv_len_fails(rebuilt, monkeypatch):
    """The parser drops it with a warning; without our own step the engine would ignore it."""
    monkeypatch.setattr(builder, "set_context_length", lambda trt, network, job: None)
    with pytest.raises(BackendError, match=r"leave an input out: .*kv_len"):
        builder.build_engine(job(rebuilt, "denoiser"))


def test_a_layer_without_the_context_length_is_refused(rebuilt):
    with pytest.raises(BackendError, match="2 of 3 layers"):
        builder.build_engine(job(rebuilt, "denoiser", attentions=3))


def test_the_context_length_can_be_a_mask(rebuilt):
    """The builder would warn if the mask did not read it."""
    assert builder.build_engine(job(rebuilt, "denoiser", length="mask")).file.bytes > 0


def test_weights_can_be_streamed(rebuilt):
    assert builder.build_engine(job(rebuilt, "denoiser", flags=("WEIGHT_STREAMING",))).weights > 0


@pytest.mark.parametrize(
    "target, precision, message",
    [
        ("sm75", {"weights": "int8"}, "sm75 has no int8 for the weights; it has fp32, fp16"),
        ("sm86", {"cache": "fp8"}, "sm86 has no fp8 for the cache; it has fp32, fp16, int8, int4"),
        ("sm90", {}, "unknown target 'sm90'"),
    ],
)
def test_a_target_without_a_dtype_of_the_model_is_refused(target, precision, message):
    config = model_config("wan-1.3b")
    formats = {"compute": "fp16", "weights": "fp16", "cache": "fp16", **precision}
    config = msgspec.structs.replace(config, precision=Precision(**formats))
    with pytest.raises(ConfigError, match=message):
        engines.resolve_targets(config, RTX, ["sm89", target])


@pytest.mark.parametrize("target", ["sm87", "sm110"])
def test_tensorrt_rtx_refuses_to_build_for_a_jetson(target):
    config = model_config("wan-1.3b")
    with pytest.raises(ConfigError, match=f"nothing for {target}: .*build --backend tensorrt'"):
        engines.resolve_targets(config, RTX, [target])


def test_tensorrt_builds_for_the_first_cuda_device(monkeypatch):
    monkeypatch.setattr("packforcing.runtime.device._cuda_runtime", lambda extra: Cuda())
    config = model_config("wan-1.3b")
    assert engines.resolve_targets(config, "tensorrt") == ("sm89",)
    with pytest.raises(ConfigError, match="GPU of this machine, sm89, and no other"):
        engines.resolve_targets(config, "tensorrt", ["sm86"])


def test_a_target_without_a_dtype_inside_a_graph_is_refused(bundle):
    def change(graph):
        there = helper.make_node("Cast", ["latent"], ["small"], to=TensorProto.FLOAT8E4M3FN)
        back = helper.make_node("Cast", ["small"], ["restored"], to=TensorProto.FLOAT)
        for node in graph.node:
            node.input[:] = ["restored" if name == "latent" else name for name in node.input]
        graph.node.insert(0, there)
        graph.node.insert(1, back)

    edit(bundle, "vae_decoder", change)
    result = build(bundle, "--target", "sm86,sm89")
    assert result.exit_code == 2
    assert "holds fp8, which sm86 lacks; it has fp32, fp16, int8, int4" in result.stderr
    path, config = bundle / "vae_decoder.onnx", read_manifest(bundle).config
    engines.check_graph(path, "vae_decoder", config, ["sm89"])


def test_fp32_is_refused(tiny_bundle):
    with pytest.raises(ConfigError, match=r"computes in fp32.*--precision fp16"):
        engines.build_engines(tiny_bundle)


def test_a_refusal_of_the_library_is_quoted(bundle):
    def change(graph):
        for node in graph.node:
            if node.op_type == "Tanh":
                node.op_type = "Det"

    edit(bundle, "vae_decoder", change)
    with pytest.raises(BackendError, match=r"builds no engine of vae_decoder: it says: .*Det"):
        engines.build_engines(bundle)
    assert {"denoiser", "compressor"} == {p.stem for p in (bundle / "engines").rglob("*.engine")}


def test_a_build_on_the_device_counts_its_gpu_in_the_same_memory(tiny_half_bundle, monkeypatch):
    """The builder's own, weights, scratch and the context; swap holds what the GPU does not use."""
    config, path = read_manifest(tiny_half_bundle).config, tiny_half_bundle / "denoiser.onnx"
    size = sum(file.stat().st_size for file in path.parent.glob("denoiser.onnx*"))
    host, _ = engines.required_bytes(path)
    whole = build_bytes(config, "denoiser", size)
    scratch = max(n for call, n in scratch_bytes(config).items() if call.startswith("denoiser"))
    assert whole == host + weight_bytes(config)["denoiser"] + scratch + CUDA_CONTEXT

    def require(free, swap):
        monkeypatch.setattr(engines, "free_memory", lambda: free)
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=swap))
        engines.require_resources(path, config)

    require(whole, 0)
    require(whole - host, 1 << 40)
    for free, swap in ((whole - 1, 0), (whole - host - 1, 1 << 40)):
        with pytest.raises(BackendError, match=r"on this device needs .* of swap are free"):
            require(free, swap)


def test_too_little_memory_or_disk_is_refused_before_a_build(bundle, monkeypatch):
    monkeypatch.setattr(engines, "MEMORY", (0, 1 << 60))
    with pytest.raises(BackendError, match=r"needs 1073741824.00 GiB of memory and .* is free"):
        engines.build_engines(bundle)
    monkeypatch.setattr(engines, "MEMORY", (0, 0))
    monkeypatch.setattr(engines, "DISK", (0, 1 << 60))
    with pytest.raises(OutputError, match=r"needs 1,152,921,504.6 GB and the disk of"):
        engines.build_engines(bundle)


def test_a_concurrent_build_is_refused(bundle):
    folder = bundle / "engines"
    folder.mkdir()
    with FileLock(folder / engines.LOCK), pytest.raises(OutputError, match="another process"):
        engines.build_engines(bundle)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--target", "sm90"], "unknown target 'sm90'; known targets: sm75, "),
        (["--target", ""], "has an empty name"),
    ],
)
def test_a_target_that_does_not_exist_is_refused_in_one_line(tiny_half_bundle, args, message):
    result = build(tiny_half_bundle, *args)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tiny_half_bundle / "engines").exists()


def test_a_missing_library_is_named_with_its_pip_command(tiny_half_bundle, monkeypatch):
    monkeypatch.setattr(engines, "installed_version", lambda name: None)
    with pytest.raises(MissingDependency, match=r"needs tensorrt-rtx, .*: pip install"):
        engines.build_engines(tiny_half_bundle)


# When it is built again

KEY = Key(
    graph={"denoiser.onnx": "a"}, tool="tensorrt-rtx 1.7.1", targets=("sm89",),
    shapes={"denoiser.block": {"N": 72, "C": 222}}, length="input",
)  # fmt: skip


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"graph": {"denoiser.onnx": "b"}}, "its graph changed"),
        ({"graph": {**KEY.graph, "denoiser.onnx.data": "b"}}, "its graph changed"),
        ({"tool": "tensorrt-rtx 2"}, "tool was tensorrt-rtx 1.7.1, now tensorrt-rtx 2"),
        ({"targets": ("sm86", "sm89")}, "targets were sm89, now sm86 sm89"),
        (
            {"shapes": {"denoiser.block": {"N": 96, "C": 222}}},
            "shapes were N=72 C=222, now N=96 C=222",
        ),
        ({"length": "mask"}, "length was as input, now as mask"),
        ({"flags": ("WEIGHT_STREAMING",)}, "flags were none, now WEIGHT_STREAMING"),
    ],
)
def test_every_change_of_the_key_is_a_reason_to_build(change, reason):
    assert differences(KEY, msgspec.structs.replace(KEY, **change)) == [reason]


def test_every_field_of_the_key_is_compared():
    parts = msgspec.structs.fields(Key)
    other = dict(graph={}, tool="", targets=(), shapes={}, length=None, flags=("REFIT",))
    assert other.keys() == {part.name for part in parts}
    for name, value in other.items():
        assert differences(KEY, msgspec.structs.replace(KEY, **{name: value})), name
    assert differences(KEY, KEY) == []


def test_only_changed_graphs_are_built_again(rebuilt):
    before = read_records(rebuilt, RTX)
    edit(rebuilt, "compressor", lambda graph: setattr(graph, "name", "renamed"))
    with pytest.raises(BackendError, match="built from another graph"):
        read_records(rebuilt, RTX)
    result = build(rebuilt)
    assert result.stderr.splitlines() == [
        "denoiser: up to date",
        "compressor: building (its graph changed)",
        "compressor: built",
        "vae_decoder: up to date",
    ]
    after = read_records(rebuilt, RTX)
    assert after["denoiser"] == before["denoiser"] and after["compressor"] != before["compressor"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda engine, record: flip(engine), r"\.engine is damaged"),
        (lambda engine, record: engine.unlink(), r"cannot read .*\.engine"),
        (lambda engine, record: record.write_bytes(record.read_bytes()[:-9]), r"json is damaged"),
        (lambda engine, record: record.write_text("{}"), r"json is damaged"),
        (lambda engine, record: record.unlink(), "is not built for tensorrt-rtx"),
    ],
)
def test_a_damaged_engine_is_refused_and_built_again(rebuilt, damage, message):
    damage(engine_file(rebuilt, RTX, "compressor"), record_file(rebuilt, RTX, "compressor"))
    with pytest.raises(BackendError, match=rf"{message}.*: run 'packforcing build"):
        read_records(rebuilt, RTX)
    reasons: list[tuple[str, str]] = []
    engines.build_engines(rebuilt, on_engine=lambda *reason: reasons.append(reason))
    assert [graph for graph, text in reasons if text.startswith("building")] == ["compressor"]
    read_records(rebuilt, RTX)


def test_a_file_in_the_place_of_the_engines_is_refused(bundle):
    (bundle / "engines").write_text("not a folder")
    with pytest.raises(BackendError, match="is not built for tensorrt-rtx"):
        read_records(bundle, RTX)
    with pytest.raises(OutputError, match="engines"):
        engines.build_engines(bundle)


# When it is killed. The graph is the smallest, so that each takes a second.

KILLED = """
import os, signal, sys
from packforcing.export import engines
engines.GPU_GRAPHS = ("compressor",)
directory, last = sys.argv[1], int(sys.argv[2])
changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "subprocess.Popen"}
seen = 0

def on_event(event, args):
    global seen
    written = event == "open" and args[2] & os.O_WRONLY and "engines" in str(args[0])
    if written or event in changes:
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(on_event)
engines.build_engines(directory, ["sm86"], on_step=lambda *step: print(*step, flush=True))
"""


def start(directory: Path, killed_at: int = 0) -> subprocess.Popen[str]:
    """A build of one engine, for another target than the one that is there."""
    command = [sys.executable, "-c", KILLED, str(directory), str(killed_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_old_or_new_or_none(directory: Path, built: Path) -> str:
    """What reads as good is, byte for byte, an engine that was finished."""
    try:
        record = read_record(directory, RTX, "compressor")
        if record is None:
            return "none"
        check_engine(directory, RTX, "compressor", record)
    except PackForcingError:
        return "damaged"
    old = read_record(built, RTX, "compressor")
    assert old is not None
    if record.key.targets == old.key.targets:
        assert record == old
        return "old"
    assert record.key.targets == ("sm86",)
    assert engine_file(directory, RTX, "compressor").stat().st_size == record.file.bytes
    return "new"


def test_a_kill_at_any_file_operation_leaves_no_wrong_engine(rebuilt, built):
    states = []
    for number in range(1, 40):
        shutil.rmtree(rebuilt / "engines")
        shutil.copytree(built / "engines", rebuilt / "engines")
        process = start(rebuilt, number)
        process.communicate()
        states.append(assert_old_or_new_or_none(rebuilt, built))
        if process.returncode == 0:  # there are no more changes than this
            break
        assert process.returncode == -signal.SIGKILL
    assert {"old", "none", "new"} == set(states)
    assert states == sorted(states, key=["old", "none", "new"].index)
    assert len(states) > 8


def test_a_child_ends_when_its_parent_is_gone(rebuilt):
    """The engine is to go into a pipe that nobody reads, so the child would wait for ever."""
    compressor = job(rebuilt, "compressor")
    os.mkfifo(compressor.engine)
    command = [sys.executable, "-P", "-m", "packforcing.export.builder"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child.communicate(msgspec.json.encode(compressor) + b"\n", timeout=60)
    assert child.returncode == 1


@pytest.mark.parametrize("steps", [1, 20, 60])
def test_a_child_ends_with_its_parent_and_the_next_build_succeeds(rebuilt, built, steps):
    process = start(rebuilt)
    assert process.stdout
    for _ in range(steps):
        if not process.stdout.readline():
            break
    children = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert assert_old_or_new_or_none(rebuilt, built) in ("old", "none", "new")
    engines.build_engines(rebuilt)
    read_records(rebuilt, RTX)
    assert not list((rebuilt / "engines" / RTX).glob(".*"))


def test_a_killed_child_is_reported(rebuilt, built):
    process = start(rebuilt)
    assert process.stdout and process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    _, message = process.communicate()
    assert "ended early, with exit code -9 (out of memory?)" in message
    assert assert_old_or_new_or_none(rebuilt, built) == "old"
    assert not list((rebuilt / "engines" / RTX).glob(".*"))


def test_an_interrupt_keeps_finished_engines_and_no_partial_file(bundle):
    command = [sys.executable, "-m", "packforcing.app.cli", "build", str(bundle)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("compressor: building"):
            break
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1]
    assert process.returncode == 130
    # an interrupt while a line is written may write that line again
    assert message.splitlines()[-1] == "interrupted: no unfinished file has its final name"
    assert not psutil.wait_procs(children, timeout=60)[1]
    folder = bundle / "engines" / RTX
    assert {path.name for path in folder.iterdir()} - {"compressor.log"} == {
        "denoiser.engine",
        "denoiser.json",
        "denoiser.log",
    }
    record = read_record(bundle, RTX, "denoiser")
    assert record is not None
    check_engine(bundle, RTX, "denoiser", record)


# At full size


@pytest.mark.full
def test_the_full_model_is_exported_and_built_within_its_memory(tmp_path, capsys):
    directory = tmp_path / "bundle"
    model = ("--model", "wan-1.3b", "--random-weights")
    _, seconds, peak = run_measured("export", *model, "--out", directory)
    lines = [f"export: {seconds:.0f} s, {peak / 1e9:.2f} GB of memory"]
    assert peak <= 5e9
    _, seconds, peak = run_measured("build", directory, "--target", "sm86,sm89,sm120", "--json")
    lines.append(f"build: {seconds:.0f} s, {peak / 1e9:.2f} GB of memory")
    records = read_records(directory, RTX)
    for graph, record in records.items():
        scratch = ", ".join(f"{size / 1e6:.1f}" for size in record.scratch.values())
        lines.append(
            f"{graph}: {record.seconds:.0f} s, {record.peak_memory / 1e9:.2f} GB of memory, "
            f"engine {record.file.bytes / 1e6:.1f} MB, weights {record.weights / 1e6:.1f} MB, "
            f"scratch {scratch} MB"
        )
        memory, disk = engines.required_bytes(directory / f"{graph}.onnx")
        assert record.peak_memory < memory and record.file.bytes < disk, graph
    with capsys.disabled():
        print("", *lines, sep="\n")
    graphs = [path for graph in records for path in directory.glob(f"{graph}.onnx*")]
    stored = sum(path.stat().st_size for path in graphs)
    assert sum(record.weights for record in records.values()) == pytest.approx(stored, rel=0.01)
    scratch = records["denoiser"].scratch
    assert max(scratch.values()) <= 330e6
    # the decoder takes its turn on the same scratch
    assert max(records["vae_decoder"].scratch.values()) <= max(scratch.values())


@pytest.mark.parametrize("system", ["darwin", "linux"])
def test_peak_memory_is_measured_without_proc(monkeypatch, system):
    """macOS has no /proc, and counts in bytes where others count in KiB."""
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(
        Path, "read_text", lambda path, **_: (_ for _ in ()).throw(OSError(str(path)))
    )
    assert builder.peak_memory() >= peak * (1 if system == "darwin" else 1024)

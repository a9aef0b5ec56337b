"""TensorRT 10.16 and 11.4 on an emulated Jetson: engines are built, loaded and rendered with, by
the names that each release has; and what is refused, with what to install."""

import os
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import tests
from packforcing.errors import BackendError, ConfigError
from packforcing.export import builder, engines
from packforcing.export.nvfp4 import tensorrt_model
from packforcing.runtime import Session, demo_bundle, tensorrt_releases
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.engine_records import (
    Key,
    graph_files,
    read_record,
    read_records,
    shapes,
)
from packforcing.runtime.tensorrt_releases import find_release, old_jetpack
from tests.emulated import SCRATCH, Cuda, build_engines
from tests.helpers import PROMPT, SEED, run
from tests.tensorrt_stub import ORIN, VERSIONS, has_lengths, install, make_library


@pytest.fixture(params=VERSIONS)
def version(request, tmp_path, monkeypatch):
    """A release, for this process and for the builder's; the GPU is an Orin's."""
    cuda = Cuda(1 << 33, target=ORIN, integrated=True)
    install(tmp_path / "site", request.param)
    root = Path(tests.__file__).parents[1]
    path = os.pathsep.join([str(tmp_path / "site"), str(root), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(sys.modules, "tensorrt", make_library(request.param, cuda))
    monkeypatch.setattr("packforcing.runtime.device._cuda_runtime", lambda extra: cuda)
    return request.param


@pytest.fixture
def in_process(monkeypatch):
    """Build without a child process, which takes seconds to start."""

    def build(directory, job, log, on_progress):
        with monkeypatch.context() as context:
            context.chdir(directory)
            return builder.build_engine(job)

    monkeypatch.setattr(engines, "_run_child", build)


@pytest.fixture
def bundle(tiny_half_bundle, tmp_path):
    return Path(shutil.copytree(tiny_half_bundle, tmp_path / "bundle"))


def test_engines_are_built_in_child_processes(version, bundle):
    messages = []
    records = engines.build_engines(
        bundle, backend="tensorrt", on_engine=lambda graph, text: messages.append(text)
    )
    assert messages == 3 * ["building (not built yet)", "built"]
    assert records == read_records(bundle, "tensorrt")
    denoiser = records["denoiser"]
    assert denoiser.key.tool == f"tensorrt {version}" and denoiser.key.targets == ("sm87",)
    assert denoiser.key.length == ("input" if has_lengths(version) else "mask")
    assert list(denoiser.scratch.values()) == [SCRATCH, SCRATCH - 1]  # as the engine says
    assert denoiser.weights == 1000 and denoiser.kernels[0].operands == ("fp16",) * 3


def test_engines_are_loaded_and_render_the_same_frames(version, tmp_path):
    demo = Path(shutil.copytree(demo_bundle(), tmp_path / "demo"))
    build_engines(demo, backend="tensorrt", tool=f"tensorrt {version}", targets=("sm87",))
    with Session.open(demo, threads=1) as host:
        expected = np.concatenate(list(host.stream(PROMPT, 2, seed=SEED)))
    with Session.open(demo, backend="tensorrt", threads=1) as session:
        frames = np.concatenate(list(session.stream(PROMPT, 2, seed=SEED)))
    np.testing.assert_array_equal(frames, expected)


def test_a_build_continues_where_it_was_stopped(version, in_process, bundle, monkeypatch):
    """What is built is not built again: after the first engine, the memory is gone."""
    require = engines.require_resources

    def full(graph, shared):
        if graph.stem != "denoiser":
            raise BackendError("no memory")
        require(graph, shared)

    monkeypatch.setattr(engines, "require_resources", full)
    with pytest.raises(BackendError, match="no memory"):
        engines.build_engines(bundle, backend="tensorrt")
    assert read_record(bundle, "tensorrt", "denoiser")
    monkeypatch.setattr(engines, "require_resources", require)
    messages = []
    engines.build_engines(bundle, backend="tensorrt", on_engine=lambda *text: messages.append(text))
    assert messages[0] == ("denoiser", "up to date") and len(messages) == 5


def test_the_memory_of_a_build_is_that_of_gpu_and_host(version, in_process, bundle, monkeypatch):
    config, requests = read_manifest(bundle).config, []
    monkeypatch.setattr(engines, "build_bytes", lambda *of: requests.append(of) or 1 << 60)
    with pytest.raises(BackendError, match="building denoiser on this device needs 1073741824"):
        engines.build_engines(bundle, backend="tensorrt")
    assert [(of[0], of[1]) for of in requests] == [(config, "denoiser")]
    assert requests[0][2] == sum(file.stat().st_size for file in bundle.glob("denoiser.onnx*"))


def test_the_length_is_set_as_the_release_allows(version, in_process, bundle):
    """Both forms where there are both; 10 has the mask alone, and says so before it builds."""
    engines.build_engines(bundle, backend="tensorrt", length="mask")
    if has_lengths(version):
        engines.build_engines(bundle, backend="tensorrt", length="input")
    else:
        with pytest.raises(ConfigError, match=rf"tensorrt {version} .*: use --length mask"):
            engines.build_engines(bundle, backend="tensorrt", length="input")


def job(bundle, version):
    """What the child process would be given for the denoiser."""
    manifest = read_manifest(bundle)
    key = Key(
        graph=graph_files(manifest, "denoiser"),
        tool=f"tensorrt {version}",
        targets=("sm87",),
        shapes=shapes(manifest.config, "denoiser"),
        length=find_release("tensorrt", version).lengths[0],
    )
    return engines.build_job(manifest, "tensorrt", "denoiser", key, bundle / "new.engine")


def test_a_layer_without_a_length_is_refused(version, bundle, monkeypatch):
    """What the builder would leave out: in 11 with a warning, in 10 nothing reads it."""
    monkeypatch.chdir(bundle)
    builder.build_engine(job(bundle, version))
    monkeypatch.setattr(builder, "set_context_length", lambda trt, network, job: None)
    with pytest.raises(BackendError, match=r"leave an input out|has no length"):
        builder.build_engine(job(bundle, version))


@pytest.mark.parametrize("forget", ["network_flags", "reads_length", "lengths"])
def test_what_the_table_says_is_needed(version, bundle, monkeypatch, forget):
    """With the entry of the other releases 10.16 does not build; 11 takes either."""
    newest, oldest = tensorrt_releases.RELEASES["tensorrt"]
    wrong = oldest._replace(**{forget: getattr(newest, forget)})
    monkeypatch.setitem(tensorrt_releases.RELEASES, "tensorrt", (newest, wrong))
    monkeypatch.chdir(bundle)
    changed = job(bundle, version)
    if forget == "lengths" and not has_lengths(version):
        changed = msgspec.structs.replace(changed, length="input")
    if has_lengths(version):
        builder.build_engine(changed)
        return
    with pytest.raises((BackendError, AttributeError), match=r"weakly|unknown input|no key_value"):
        builder.build_engine(changed)


@pytest.mark.parametrize(("old", "needs"), [("10.3.0", "10.16"), ("10.13.3.9", "10.16")])
def test_an_older_release_is_refused_with_the_upgrade(old, needs):
    with pytest.raises(BackendError, match=rf"tensorrt {old} is too old, {needs} .*JetPack 7\.2"):
        find_release("tensorrt", old)
    for newer in ("10.16", "10.16.2.10", "11.0.0.114", "11.4.1", "12.0"):
        assert find_release("tensorrt", newer).lengths[-1] == "mask"


@pytest.mark.parametrize(
    ("text", "jetpack"),
    [
        ("# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64", "6"),
        ("# R35 (release), REVISION: 6.0, GCID: 37391689, BOARD: t186ref, EABI: aarch64", "5"),
        ("# R38 (release), REVISION: 2.1, GCID: 42061081, BOARD: generic", None),
        ("nothing of the kind", None),
        (None, None),
    ],
)
def test_an_old_jetpack_is_known(text, jetpack, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_releases, "L4T", tmp_path / "nv_tegra_release")
    if text is not None:
        (tmp_path / "nv_tegra_release").write_text(text)
    problem = old_jetpack()
    assert bool(problem) == (jetpack is not None)
    if jetpack:
        assert f"this is JetPack {jetpack} " in problem and "upgrade" in problem


def test_a_graph_without_the_length_and_with_the_mask_is_the_same(tiny_bundle, tmp_path):
    """What 10.16 builds, in ONNX Runtime: the mask is false from `kv_len` on."""
    path = tiny_bundle / "denoiser.onnx"
    stripped = onnx.load_model_from_string(tensorrt_model(path, without_length=True))
    original = onnx.load(path)
    attentions = [node for node in stripped.graph.node if node.op_type == "Attention"]
    before = [node for node in original.graph.node if node.op_type == "Attention"]
    masked = [new for new, old in zip(attentions, before) if "kv_len" in old.input]
    assert len(masked) == read_manifest(tiny_bundle).config.layers
    assert not any("kv_len" in node.input for node in stripped.graph.node)
    assert "kv_len" in [tensor.name for tensor in stripped.graph.input]
    _set_masks(stripped.graph, masked)
    config = read_manifest(tiny_bundle).config
    generator = np.random.default_rng(SEED)
    axes = {"N": config.block_tokens, "C": config.context_tokens}
    feeds = {}
    for tensor in original.graph.input:
        shape = [d.dim_value or axes[d.dim_param] for d in tensor.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)
        feeds[tensor.name] = generator.normal(size=shape).astype(dtype)
    feeds["kv_len"] = np.array([axes["N"] + axes["C"] // 3], np.int64)
    onnx.save(stripped, tmp_path / "masked.onnx")
    for file in tiny_bundle.glob("denoiser.onnx.*"):
        shutil.copy(file, tmp_path)
    results = [
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)
        for model in (path, tmp_path / "masked.onnx")
    ]
    for expected, actual in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def _set_masks(graph, attentions):
    """Compute index < kv_len for the full query dimension, which ONNX Runtime needs."""
    constants = {"zero": 0, "one": 1}
    for name, value in constants.items():
        graph.initializer.append(helper.make_tensor(f"mask.{name}", TensorProto.INT64, (), [value]))
    graph.initializer.append(helper.make_tensor("mask.ones", TensorProto.INT64, (2,), [1, 1]))
    for number, node in enumerate(attentions):
        q, k = node.input[:2]
        p = f"mask.{number}"
        nodes = [
            helper.make_node("Shape", [q], [f"{p}.q"], start=2, end=3),
            helper.make_node("Shape", [k], [f"{p}.k"], start=2, end=3),
            helper.make_node("Squeeze", [f"{p}.k"], [f"{p}.keys"]),
            helper.make_node("Range", ["mask.zero", f"{p}.keys", "mask.one"], [f"{p}.index"]),
            helper.make_node("Less", [f"{p}.index", "kv_len"], [f"{p}.valid"]),
            helper.make_node("Concat", ["mask.ones", f"{p}.q", f"{p}.k"], [f"{p}.shape"], axis=0),
            helper.make_node("Expand", [f"{p}.valid", f"{p}.shape"], [f"{p}.mask"]),
        ]
        position = list(graph.node).index(node)
        for offset, new in enumerate(nodes):
            graph.node.insert(position + offset, new)
        node = graph.node[position + len(nodes)]
        inputs = [*node.input[:3], f"{p}.mask"]
        del node.input[:]
        node.input.extend(inputs)


def test_commands_know_the_device(version, in_process, bundle):
    result = run("build", bundle, "--backend", "tensorrt")
    assert result.exit_code == 0, result.stderr
    shown = run("plan", "--bundle", bundle).stdout
    assert "on sm87" in shown and "The GPU has the host's memory" in shown

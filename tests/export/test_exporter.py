"""Graphs that would go wrong silently are refused, and bundles that are not what they say."""

import json
import logging
import shutil
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch

from packforcing.compressor import Compressor
from packforcing.config import Precision
from packforcing.errors import BundleError, ExportError, OutputError
from packforcing.export import export_bundle
from packforcing.export.exporter import save_graph
from packforcing.export.graphs import WRAPPERS, example_inputs, export_graph
from packforcing.export.lint import TRACE_SIZES, lint
from packforcing.files import file_sha256
from packforcing.model import LazyWeights, Model, open_weights, save_model
from packforcing.runtime import Session
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.bundle import (
    SCHEMA_VERSION,
    GraphSpec,
    TensorSpec,
    check_files,
    contract,
    read_manifest,
    weight_files,
)
from packforcing.runtime.device import view

SPEC = GraphSpec(
    (TensorSpec("a", (1, "N", 4)), TensorSpec("b", (1, "N", 4))), (TensorSpec("y", (1, "N", 4)),)
)


def exported(function, spec=SPEC) -> ir.Model:
    class Plain(torch.nn.Module):
        def forward(self, a, b):
            return function(a, b)

    n = torch.export.Dim("N")
    program = torch.onnx.export(
        Plain().eval(), example_inputs(spec), dynamo=True, opset_version=24, verbose=False,
        input_names=["a", "b"], output_names=["y"], dynamic_shapes=({1: n}, {1: n}),
    )  # fmt: skip
    return program.model


def test_lint_passes_a_sound_graph():
    lint("sound", exported(lambda a, b: a + b), SPEC)


def test_lint_refuses_an_input_that_nothing_reads():
    with pytest.raises(ExportError, match="nothing reads input b"):
        lint("deaf", exported(lambda a, b: a + 1), SPEC)


def test_lint_refuses_ops_outside_the_list():
    with pytest.raises(ExportError, match="CumSum"):
        lint("foreign", exported(lambda a, b: torch.cumsum(a, 1) + b), SPEC)


def test_lint_refuses_a_baked_size():
    n = TRACE_SIZES["N"]
    model = exported(lambda a, b: a + b)
    node = ir.Node("", "Reshape", [model.graph.outputs[0], constant(model, [1, n, 4])])
    rename(model, node)
    with pytest.raises(ExportError, match="bakes in a size"):
        lint("baked", model, SPEC)


def test_lint_refuses_another_shape_or_name_than_the_contract():
    model = exported(lambda a, b: a + b)
    fixed = GraphSpec(SPEC.inputs, (TensorSpec("y", (1, 1009, 4)),))
    with pytest.raises(ExportError, match="output y"):
        lint("shape", model, fixed)
    with pytest.raises(ExportError, match="inputs are"):
        lint("name", model, GraphSpec(SPEC.inputs[::-1], SPEC.outputs))


def test_a_denoiser_whose_attention_ignores_kv_len_is_refused(tiny_model, monkeypatch):
    """Attention that forgets its length would read garbage; the export refuses it."""
    import packforcing.transformer as transformer

    real = transformer.attention
    monkeypatch.setattr(transformer, "attention", lambda q, k, v, n=None: real(q, k, v))
    with pytest.raises(ExportError, match="nothing reads input kv_len"):
        export_graph(tiny_model.config, tiny_model.weights(), "denoiser")


def test_export_keeps_one_weight_in_memory_at_a_time(tiny_model, tmp_path):
    """Memory must not grow with the model: each weight is let go before the next is read."""
    weights, alive, read = tiny_model.weights(), [], Counter()

    def draw(name: str) -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= 1, f"others are kept while {name} is read"
        tensor = weights[name].clone()
        alive.append(weakref.ref(tensor))
        read[name] += 1
        return tensor

    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    config = msgspec.structs.replace(tiny_model.config, precision=half)
    graph = export_graph(config, LazyWeights(weights, draw), "denoiser")
    assert not read  # only when it is written
    save_graph(graph, tmp_path / "denoiser.onnx")
    assert set(read) == {name for name in weights if name in graph.graph.initializers}
    assert set(read.values()) == {1}


def test_a_checkpoint_has_the_weights_of_the_model_it_was_saved_from(tiny_model, tmp_path):
    """Head rows included, which a checkpoint keeps in another order than the graph."""
    save_model(tiny_model, tmp_path / "tiny.safetensors", torch.float32)
    weights = open_weights(tiny_model.config, tmp_path / "tiny.safetensors")
    expected = tiny_model.weights()
    assert set(weights) == set(expected)
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


@pytest.mark.parametrize("name", ["denoiser", "compressor", "vae_decoder"])
def test_gpu_graphs_store_their_weights_in_fp16(tiny_model, tiny_half_bundle, name):
    graph = ir.load(tiny_half_bundle / f"{name}.onnx").graph
    weights = [v for key, v in graph.initializers.items() if key in tiny_model.weights()]
    assert weights and all(value.dtype == ir.DataType.FLOAT16 for value in weights)


def test_a_full_disk_is_refused_before_the_export(tiny_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("packforcing.files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"the bundle needs .* kB and the disk of"):
        export_bundle(tiny_model.config, tiny_model.weights(), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_the_manifest_has_config_graphs_and_files(tiny_bundle, tiny_config):
    manifest = read_manifest(tiny_bundle)
    check_files(tiny_bundle, manifest)
    assert manifest.config == tiny_config
    assert manifest.graphs == contract(tiny_config)
    assert set(manifest.files) == {f"{name}.onnx" for name in WRAPPERS}


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def edit(bundle, change):
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m.update(schema_version=SCHEMA_VERSION + 1), "schema version"),
    (lambda m: m.pop("config"), "damaged"),
    (lambda m: m["config"].update(layers="many"), r"\$\.config\.layers"),
    (lambda m: m["config"].update(heads=7), "multiple of heads"),
    (lambda m: m["config"].update(layers=3), "graph 'denoiser'|graph 'prompt'"),
    (lambda m: m["graphs"].pop("prompt"), "graph 'prompt'"),
    (lambda m: m["files"].pop("prompt.onnx"), "does not list prompt.onnx"),
    (lambda m: m["files"].update({"../x": m["files"]["prompt.onnx"]}), "not a file inside"),
    (lambda m: m["files"].update({"a\0b": m["files"]["prompt.onnx"]}), "not a file inside"),
    (lambda m: m["config"].update(text_dim=4), "text_dim of at least 22"),
])  # fmt: skip
def test_damaged_manifests_are_refused(copy, change, message):
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        read_manifest(copy)


def test_a_manifest_that_is_not_utf8_is_refused(copy):
    path = copy / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"words", b"wo\xffds"))
    with pytest.raises(BundleError, match="damaged"):
        read_manifest(copy)


def test_a_graph_of_another_dtype_is_refused(copy):
    spec = contract(read_manifest(copy).config)["prompt"]
    integers = tuple(TensorSpec(t.name, t.shape, "int64") for t in spec.outputs)
    with pytest.raises(BundleError, match="does not have the tensors"):
        OnnxGraph(copy / "prompt.onnx", GraphSpec(spec.inputs, integers), threads=1)


def test_damaged_files_are_refused(copy):
    manifest = read_manifest(copy)
    graph = copy / "denoiser.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError, match=r"denoiser\.onnx is damaged"):
        check_files(copy, manifest)
    graph.unlink()
    with pytest.raises(BundleError, match=r"lacks .*denoiser\.onnx"):
        check_files(copy, manifest)


def test_a_bundle_may_have_what_the_hub_and_desktops_add(copy):
    """A model card, dot files and folders: no graph reads its weights there."""
    for name in ("README.md", ".gitattributes", ".DS_Store", "Thumbs.db"):
        (copy / name).write_text("weights")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    check_files(copy, read_manifest(copy))


def test_large_weights_are_files_beside_their_graph(tiny_bundle, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("packforcing.export.exporter.INLINE_BYTES", 10_000)
    monkeypatch.setattr(  # tracing them again would give the same
        "packforcing.export.exporter.export_graph",
        lambda config, weights, name: ir.load(tiny_bundle / f"{name}.onnx"),
    )
    manifest = export_bundle(tiny_model.config, tiny_model.weights(), tmp_path / "large")
    check_files(tmp_path / "large", manifest)
    assert "denoiser.onnx.data" in manifest.files
    assert weight_files(tmp_path / "large" / "denoiser.onnx") == {"denoiser.onnx.data"}
    # as the hub's cache keeps a download: files under their digests, and links
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "large").iterdir():
        blob = shutil.copy(path, tmp_path / "blobs" / file_sha256(path))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{blob.name}")
    videos = []
    for bundle in (tiny_bundle, tmp_path / "large", tmp_path / "snapshot"):
        with Session.open(bundle) as session:
            videos.append(next(session.stream("a red star", 1)))
    assert np.array_equal(videos[0], videos[1]) and np.array_equal(videos[0], videos[2])


def test_an_interrupted_export_leaves_the_old_bundle(copy, tiny_model, monkeypatch):
    before = (copy / "manifest.json").read_bytes()

    def fail(name, number, count):
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_model.config, tiny_model.weights(), copy, fail)
    assert (copy / "manifest.json").read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("manifest", [None, "{}", "bundle"])
def test_export_does_not_replace_a_folder_with_other_files(tiny_model, tmp_path, copy, manifest):
    folder = copy if manifest == "bundle" else tmp_path / "web"
    folder.mkdir(exist_ok=True)
    if manifest == "{}":  # web applications have a manifest.json too
        (folder / "manifest.json").write_text(manifest)
    (folder / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not an empty folder"):
        export_bundle(tiny_model.config, tiny_model.weights(), folder)
    assert (folder / "thesis.tex").exists()


def verbosity():
    """How much every library says: levels of its loggers, and filters of warnings."""
    loggers = logging.root.manager.loggerDict.items()
    levels = {name: logger.level for name, logger in loggers if isinstance(logger, logging.Logger)}
    return levels, logging.root.level, logging.root.manager.disable, list(warnings.filters)


def test_an_export_changes_no_library_s_verbosity(tiny_model, tmp_path, caplog):
    for name in ("torch.onnx", "onnx_ir"):
        caplog.set_level(logging.INFO, name)
    export_graph(tiny_model.config, tiny_model.weights(), "prompt")  # imports what is left
    caplog.clear()
    before = verbosity()
    export_bundle(tiny_model.config, tiny_model.weights(), tmp_path / "bundle")
    assert verbosity() == before
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_path_that_cannot_exist_is_refused(tiny_model, tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        export_bundle(tiny_model.config, tiny_model.weights(), tmp_path / ("x" * 300))


def test_a_model_without_high_branch_exports_and_renders(tiny_model, tmp_path):
    """Training-free: the compressed block is the low branch alone."""
    config = msgspec.structs.replace(tiny_model.config, compressor_widths=())
    autoencoder = tiny_model.autoencoder
    bare = Model(
        config, tiny_model.transformer, autoencoder, Compressor(config, autoencoder.encode)
    )
    export_bundle(bare.config, bare.weights(), tmp_path / "bare")
    with Session.open(tmp_path / "bare") as session:
        assert sum(map(len, session.stream("a red star", 12))) == 96
        assert not view(session.rollout.buffers.mid_pass["extra"]).any()


def test_a_render_needs_neither_torch_nor_onnx(tiny_bundle, tmp_path):
    """The whole runtime in a process where importing them fails."""
    script = f"""
import sys
for name in ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors"):
    sys.modules[name] = None
from packforcing.runtime import Session
with Session.open({str(tiny_bundle)!r}) as session:
    print(session.render("a red star over navy stripes", 2, {str(tmp_path / "v.mp4")!r}).frames)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "16"


def test_a_program_started_in_the_source_folder_finds_the_rooms():
    """Also after `pip install .`, when no editable install helps and the folder comes first."""
    script = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import packforcing.calibration, packforcing.export, packforcing.runtime
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_importing_the_runtime_loads_nothing_heavy():
    heavy = "{'torch', 'onnx', 'onnxruntime', 'cv2', 'av'}"
    script = f"import sys, packforcing.runtime; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def constant(model, values):
    value = ir.Value(name="size", const_value=ir.tensor(values, name="size"))
    model.graph.register_initializer(value)
    return value


def rename(model, node):
    """Appends a node that takes over the graph's only output."""
    old = model.graph.outputs[0]
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = "y", old.shape, old.dtype
    old.name = "y_before"
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]

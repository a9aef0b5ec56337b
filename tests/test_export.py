"""Graphs that would go wrong silently are refused, and bundles that are not what they say."""

import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch

from packforcing.errors import BundleError, ExportError, OutputError
from packforcing.export import export_bundle
from packforcing.export.graphs import WRAPPERS, example_inputs, export_graph
from packforcing.export.lint import TRACE_SIZES, lint
from packforcing.runtime import Session
from packforcing.runtime.bundle import (
    SCHEMA_VERSION,
    GraphSpec,
    TensorSpec,
    check_files,
    contract,
    decoder_state_shapes,
    encoder_state_shapes,
    read_manifest,
)

SPEC = GraphSpec(
    (TensorSpec("a", (1, "N", 4)), TensorSpec("b", (1, "N", 4))), (TensorSpec("y", (1, "N", 4)),)
)


def exported(function, spec=SPEC) -> ir.Model:
    class Graph(torch.nn.Module):
        def forward(self, a, b):
            return function(a, b)

    n = torch.export.Dim("N")
    program = torch.onnx.export(
        Graph(), example_inputs(spec), dynamo=True, opset_version=24, verbose=False,
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


def test_lint_refuses_another_shape_or_name():
    model = exported(lambda a, b: a + b)
    fixed = GraphSpec(SPEC.inputs, (TensorSpec("y", (1, 1009, 4)),))
    with pytest.raises(ExportError, match="output y"):
        lint("shape", model, fixed)
    with pytest.raises(ExportError, match="inputs are"):
        lint("name", model, GraphSpec(SPEC.inputs[::-1], SPEC.outputs))


def test_an_unplugged_kv_len_is_found(tiny_model, monkeypatch):
    """Attention that forgets its length would read garbage; the export refuses it."""
    import packforcing.transformer as transformer

    real = transformer.attention
    monkeypatch.setattr(transformer, "attention", lambda q, k, v, n: real(q, k, v, None))
    with pytest.raises(ExportError, match="nothing reads input kv_len"):
        export_graph(tiny_model, "denoiser")


def test_contract_knows_the_autoencoders_state(tiny_config, tiny_model):
    autoencoder = tiny_model.autoencoder
    assert [tuple(s.shape) for s in autoencoder.decoder_state()] == decoder_state_shapes(
        tiny_config
    )
    states = autoencoder.encoder_state(tiny_config.height, tiny_config.width)
    assert [tuple(s.shape) for s in states] == encoder_state_shapes(tiny_config)


def test_a_bundle_says_what_it_is(tiny_bundle, tiny_config):
    manifest = read_manifest(tiny_bundle)
    check_files(tiny_bundle, manifest)
    assert manifest.config == tiny_config
    assert manifest.graphs == contract(tiny_config)
    assert set(manifest.files) == {f"{name}.onnx" for name in WRAPPERS}


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    import shutil

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
])  # fmt: skip
def test_damaged_manifests_are_refused(copy, change, message):
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        read_manifest(copy)


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


def test_large_weights_lie_beside_their_graph(tiny_bundle, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("packforcing.export.bundle.LARGEST_INSIDE", 10_000)
    manifest = export_bundle(tiny_model, tmp_path / "large")
    check_files(tmp_path / "large", manifest)
    assert "denoiser.onnx.data" in manifest.files
    videos = []
    for bundle in (tiny_bundle, tmp_path / "large"):
        with Session.open(bundle) as session:
            videos.append(next(session.stream("a red star", 1)))
    assert np.array_equal(*videos)


def test_a_failed_export_leaves_the_old_bundle(copy, tiny_model, monkeypatch):
    before = (copy / "manifest.json").read_bytes()

    def fail(name, number, count):
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_model, copy, fail)
    assert (copy / "manifest.json").read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_export_does_not_replace_what_is_not_a_bundle(tiny_model, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not empty and not a bundle"):
        export_bundle(tiny_model, tmp_path)


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

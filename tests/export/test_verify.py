"""`packforcing verify` passes sound bundles and names what is wrong with the others."""

import json
import math
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from packforcing import MODELS
from packforcing.app.cli import main
from packforcing.app.reports.verify import write_reports
from packforcing.errors import BackendError
from packforcing.export import oracle as oracles
from packforcing.export import verify as verifying
from packforcing.export.oracle import (
    Oracle,
    add_garbage,
    rehearsal_config,
    resize_call,
    truncate_context,
    widen_graph,
)
from packforcing.export.verify import Verification, run_graph, verify_bundle
from packforcing.files import file_record
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.bundle import contract, graph_file, read_manifest, write_manifest
from packforcing.runtime.device import HostDevice
from packforcing.runtime.engine_records import engine_file
from packforcing.words import encode_words
from tests.emulated import build_engines
from tests.helpers import TINY


@pytest.fixture
def changed(tmp_path):
    """A copy of a bundle with one graph changed, and a manifest that says it is meant so."""

    def change(bundle: Path, name: str, edit) -> Path:
        copy = Path(shutil.copytree(bundle, tmp_path / "changed"))
        path = copy / graph_file(name)
        model = ir.load(path)
        edit(model.graph)
        ir.save(model, path)
        manifest = read_manifest(copy)
        manifest.files[path.name] = file_record(path)
        write_manifest(copy, manifest)
        return copy

    return change


def weight(graph: ir.Graph, ending: str) -> tuple[ir.Value, np.ndarray]:
    (value,) = (v for name, v in graph.initializers.items() if ending in name)
    assert value.const_value is not None
    return value, value.const_value.numpy().copy()


def unplug(graph: ir.Graph) -> None:
    """Takes the length away from every attention over the context."""
    for node in graph:
        if node.op_type == "Attention" and len(node.inputs) > 6:
            node.resize_inputs(6)


@pytest.fixture(scope="module")
def sound(tiny_bundle):
    return verify_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def sound_half(tiny_half_bundle):
    return verify_bundle(tiny_half_bundle)


# Sound bundles


@pytest.mark.parametrize(
    "kind, runs", [("sound", {"onnxruntime"}), ("sound_half", {"onnxruntime", "rounded"})]
)
def test_every_output_of_a_sound_bundle_is_verified(kind, runs, request, tiny_config):
    verification = request.getfixturevalue(kind)
    assert verification.missed == []
    specs = contract(tiny_config)
    for way in runs:
        compared = {
            (check.graph, check.output) for check in verification.checks if check.run == way
        }
        # encoding a start clip is for the host, and stays in fp32 there
        graphs = specs.keys() - ({"vae_encoder"} if way == "rounded" else set())
        assert compared == {(name, out.name) for name in graphs for out in specs[name].outputs}
    full = tiny_config.policy.capacity
    calls = {check.call for check in verification.checks if check.graph == "denoiser"}
    assert calls == {f"block {b}{kind}" for b in (full // 2, full) for kind in ("", ", mid pass")}
    # the worst first, and something to see: nothing here is exact
    shares = [check.share for check in verification.checks]
    assert shares == sorted(shares, reverse=True) and shares[0] > 1e-3


def test_the_oracle_of_an_fp16_graph_is_the_fp32_model_with_weights_in_fp16(
    tiny_half_bundle, tiny_model
):
    config = tiny_model.config
    text = encode_words("a red star", config)
    oracle = Oracle(tiny_half_bundle / graph_file("prompt"), contract(config)["prompt"])
    verification = oracle.run({"text": text})
    transformer = type(tiny_model.transformer)(config)
    state = tiny_model.transformer.state_dict()
    transformer.load_state_dict({name: t.half().float() for name, t in state.items()})
    with torch.inference_mode():
        expected = [t for pair in transformer.cross_kv(torch.from_numpy(text)) for t in pair]
    for name, tensor in zip(verification, expected):
        np.testing.assert_allclose(verification[name], tensor.numpy(), rtol=1e-4, atol=1e-5)


def test_a_widened_graph_has_no_fp16_but_its_stored_weights(tiny_half_bundle):
    model = ir.load(tiny_half_bundle / graph_file("denoiser"))
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    widen_graph(model)
    assert {name: v.const_value for name, v in model.graph.initializers.items()} == stored
    assert any(tensor.dtype == ir.DataType.FLOAT16 for tensor in stored.values())
    values = [out for node in model.graph for out in node.outputs]
    assert ir.DataType.FLOAT16 not in {v.dtype for v in (*model.graph.inputs, *values)}


def test_garbage_is_finite_and_beyond_kv_len_alone(tiny_config):
    spec = contract(tiny_config)["denoiser"]
    sizes = {"N": 5, "C": 9}
    inputs = {
        t.name: np.ones([sizes.get(str(n), n) for n in t.shape], t.dtype) for t in spec.inputs
    }
    inputs["kv_len"][0] = sizes["N"] + 4
    one, two = (add_garbage(spec, inputs, seed) for seed in (0, 1))
    for name, array in truncate_context(spec, one).items():
        np.testing.assert_array_equal(array, inputs[name][tuple(map(slice, array.shape))])
    for name in ("k_ctx.0", "v_ctx.1"):
        assert truncate_context(spec, one)[name].shape[2] == 4
        assert np.isfinite(one[name]).all()
        assert (one[name][:, :, 4:] != two[name][:, :, 4:]).all()


def test_the_full_model_is_rolled_out_on_a_grid_whose_scores_fit():
    wan, demo = MODELS["wan-1.3b"], MODELS["demo"]
    small = rehearsal_config(wan)
    scores = 4 * small.heads * small.block_tokens * (small.block_tokens + small.context_tokens)
    assert scores <= oracles.SCORE_BYTES
    policy = small.policy
    assert (policy.sink, policy.mid, policy.recent) == (1, 1, 1) and small.compressed_tokens > 0
    assert (small.layers, small.dim, small.text_len) == (wan.layers, wan.dim, wan.text_len)
    assert rehearsal_config(demo).context_tokens == demo.context_tokens
    text = oracles.describe_inputs(small, wan)
    assert "64 and 2 new tokens" in text and "6,240 and 182 new tokens" in text
    assert "random" in text and "since" not in oracles.describe_inputs(demo, demo)


# What is missed


def test_an_attention_without_kv_len_fails(tiny_bundle, tiny_config, changed, tmp_path):
    bundle, folder = changed(tiny_bundle, "denoiser", unplug), tmp_path / "new" / "folder"
    result = CliRunner().invoke(main, ["verify", str(bundle), "--out", str(folder)])
    assert result.exit_code == 1, result.output
    full = tiny_config.policy.capacity
    missed = [line for line in result.stdout.splitlines() if line.startswith("missed: ")]
    assert any(f"denoiser, onnxruntime, block {full // 2}, flow" in line for line in missed)
    assert all("reads beyond kv_len" in line for line in missed)
    # with a full context there is nothing beyond it, and the first layer's keys come before
    assert not any(f"block {full}" in line or "k_new.0" in line for line in missed)
    assert f"{len(missed)} of " in (folder / "verify.html").read_text()


def test_a_leak_below_every_tolerance_fails(tiny_bundle, changed):
    def leak(graph: ir.Graph) -> None:
        flow = graph.outputs[0]
        values = next(value for value in graph.inputs if value.name == "v_ctx.0")
        tiny = graph.register_initializer  # a weight of its own
        little = ir.Value(name="little", const_value=ir.tensor(np.float32(1e-7), name="little"))
        tiny(little)
        mean = ir.Node("", "ReduceMean", [values], [ir.AttrInt64("keepdims", 0)])
        part = ir.Node("", "Mul", [mean.outputs[0], little])
        leaky = ir.Node("", "Add", [flow, part.outputs[0]])
        leaky.outputs[0].name, flow.name = "flow", "sound_flow"
        leaky.outputs[0].shape, leaky.outputs[0].dtype = flow.shape, flow.dtype
        graph.extend([mean, part, leaky])
        graph.outputs[0] = leaky.outputs[0]

    missed = verify_bundle(changed(tiny_bundle, "denoiser", leak)).missed
    assert {(check.graph, check.output) for check in missed} == {("denoiser", "flow")}
    assert all(check.share < 1 and not check.independent for check in missed)


def test_a_value_beyond_the_range_of_fp16_fails(tiny_half_bundle, changed):
    def enlarge(graph: ir.Graph) -> None:
        value, array = weight(graph, "blocks.0.ffn.2.weight")
        value.const_value = ir.tensor(array * np.float16(2e4), name=value.name)

    verification = verify_bundle(changed(tiny_half_bundle, "denoiser", enlarge))
    missed = {(check.graph, check.output): check for check in verification.missed}
    assert math.isinf(missed["denoiser", "flow"].share)
    assert ("denoiser", "k_new.0") not in missed  # it comes before the feed-forward
    # ONNX Runtime alone would not notice: it keeps to fp32 on a CPU
    assert {(check.graph, check.run) for check in missed.values()} == {("denoiser", "rounded")}


def test_a_graph_with_other_weights_than_the_oracle_fails(tiny_half_bundle, changed, monkeypatch):
    def negate_one_row(graph: ir.Graph) -> None:
        value, array = weight(graph, "blocks.1.self_attn.k.weight")
        array[:, 5] *= -1
        value.const_value = ir.tensor(array, name=value.name)

    bundle = changed(tiny_half_bundle, "denoiser", negate_one_row)
    sound = lambda path, spec, round_to_fp16=False: Oracle(  # noqa: E731
        (path if round_to_fp16 else tiny_half_bundle / path.name), spec, round_to_fp16
    )
    monkeypatch.setattr(verifying, "Oracle", sound)
    missed = {(check.graph, check.output) for check in verify_bundle(bundle).missed}
    assert {("denoiser", "k_new.1"), ("denoiser", "k_pool")} <= missed
    assert ("denoiser", "k_new.0") not in missed


# Engines


@pytest.fixture
def built(tiny_bundle, tmp_path):
    """A bundle with engines: files that stand for them, with records as a build writes them."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "built"))
    build_engines(bundle)
    return bundle


def no_gpu():
    raise BackendError("no NVIDIA driver answers")


def test_engines_without_a_gpu_are_reported_as_built_and_not_run(built, monkeypatch):
    monkeypatch.setattr(verifying, "gpus", no_gpu)
    text, backends = verifying.describe_engines(built)
    assert backends == []
    assert text == (
        "tensorrt-rtx for sm86 sm89: built from these graphs and intact, not run here "
        "(no NVIDIA driver answers)"
    )


@pytest.mark.parametrize("fault", ["damaged", "another graph"])
def test_damaged_engines_and_those_of_other_graphs_are_refused(built, fault, monkeypatch):
    monkeypatch.setattr(verifying, "gpus", no_gpu)
    if fault == "damaged":
        engine_file(built, "tensorrt-rtx", "compressor").write_bytes(b"an engime")
    else:
        manifest = read_manifest(built)
        path = built / graph_file("compressor")
        model = ir.load(path)
        model.producer_version = "another"
        ir.save(model, path)
        manifest.files[path.name] = file_record(path)
        write_manifest(built, manifest)
    with pytest.raises(BackendError, match=f"compressor.engine.*{fault}.*packforcing build"):
        verify_bundle(built)


def test_engines_are_run_and_compared_on_a_gpu(built, tiny_bundle, monkeypatch):
    """With ONNX Runtime in the place of engines, one of them built from other weights."""

    class Stand:
        def __init__(self, backend, directory, config):
            assert backend == "tensorrt-rtx"
            self.device = HostDevice()

        def load(self, specs):
            graph = ir.load(tiny_bundle / graph_file("compressor"))
            value, array = weight(graph.graph, "compressor.high.0.weight")
            value.const_value = ir.tensor(array * array.dtype.type(2), name=value.name)
            other = built / "engines" / "other.onnx"
            ir.save(graph, other)
            paths = {name: tiny_bundle / graph_file(name) for name in verifying.GPU_GRAPHS}
            paths["compressor"] = other
            return {name: OnnxGraph(path, specs[name], None) for name, path in paths.items()}

        def close(self):
            pass

    monkeypatch.setattr(verifying, "gpus", lambda: ["a card"])
    monkeypatch.setattr(verifying, "Engines", Stand)
    verification = verify_bundle(built)
    assert {(check.graph, check.run) for check in verification.missed} == {
        ("compressor", "tensorrt-rtx")
    }
    ran = {check.graph for check in verification.checks if check.run == "tensorrt-rtx"}
    assert ran == set(verifying.GPU_GRAPHS)


def test_calls_of_a_small_grid_are_repeated_to_the_shapes_of_engines(tiny_bundle):
    """A context of three full blocks stays one of three, a full context stays full."""
    small, specs = TINY, contract(TINY)
    config = msgspec.structs.replace(small, width=2 * small.width)
    graphs = {name: Oracle(tiny_bundle / graph_file(name), specs[name]) for name in specs}
    calls = [
        resize_call(specs["denoiser"], call, small, config)
        for call in oracles.record_calls(small, graphs)["denoiser"]
    ]
    new, half, context = config.block_tokens, config.compressed_tokens, config.context_tokens
    sizes = [(call.inputs["tokens"].shape[1], int(call.inputs["kv_len"][0])) for call in calls]
    assert sizes == [(n, n + valid) for valid in (3 * new, context) for n in (new, half)]
    graph = OnnxGraph(tiny_bundle / graph_file("denoiser"), specs["denoiser"], None)
    for call in calls:
        outputs = run_graph(graph, specs["denoiser"], HostDevice(), call.inputs)
        assert call.inputs["k_ctx.0"].shape[2] == context
        assert all(np.isfinite(array).all() for array in outputs.values())


# The report and the command


def test_the_report_holds_every_output_and_loads_nothing(sound, tmp_path):
    page = write_reports(tmp_path, sound)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verify.html", "verify.json"]
    text = page.read_text()
    for graph in contract(TINY):
        count = sum(check.graph == graph for check in sound.checks)
        assert text.count(f"<tr><th>{graph}</th><td>onnxruntime") == count > 0
    assert f"all {len(sound.checks)} outputs verified" in text
    assert "src=" not in text and "href=" not in text
    saved = (tmp_path / "verify.json").read_bytes()
    assert msgspec.json.decode(saved, type=Verification) == sound


def test_the_report_fits_a_phone(sound, tmp_path, open_on_phone):
    page = open_on_phone(write_reports(tmp_path, sound))
    box = page.locator(".wide").last.evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert box[0] > box[1]  # the table scrolls, not the page


def test_an_infinite_error_is_null_in_json(sound, tmp_path):
    worst = msgspec.structs.replace(sound.checks[0], largest=math.inf, share=math.inf, passed=False)
    page = write_reports(tmp_path, msgspec.structs.replace(sound, checks=[worst, *sound.checks]))
    saved = json.loads((tmp_path / "verify.json").read_text())
    assert saved["checks"][0]["largest"] is None and not saved["checks"][0]["passed"]
    assert f"1 of {len(saved['checks'])} outputs missed" in page.read_text()


@pytest.mark.parametrize("what", ["bundle", "folder", "memory"])
def test_mistakes_end_in_one_line(what, tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    if what == "memory":
        monkeypatch.setattr(verifying, "MEMORY_RESERVE", 1 << 60)
    bundle = tmp_path / "absent" if what == "bundle" else tiny_bundle
    out = tmp_path / "file" / "out" if what == "folder" else tmp_path / "out"
    result = CliRunner().invoke(main, ["verify", str(bundle), "--out", str(out)])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1

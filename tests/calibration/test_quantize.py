"""`packforcing quantize`: what becomes of weights and cache, and that all downstream knows it."""

import json
import math
import re
import shutil
from functools import partial

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from packforcing import MODELS
from packforcing.app.cli import main
from packforcing.app.reports.verify import write_reports
from packforcing.calibration.activations import (
    BINS,
    LOWEST,
    OCTAVE,
    SOURCE,
    Source,
    add,
    calibrate,
    calls,
    forms,
    mean_products,
    read,
    statistics_for,
)
from packforcing.calibration.matmuls import matrices, stored
from packforcing.calibration.recipes import CACHE, ENOUGH, WEIGHTS, Loss, quantised_layers
from packforcing.calibration.weights import (
    cache_steps,
    quantize_bundle,
    quantize_cache,
    rounded,
    scales,
)
from packforcing.config import Precision
from packforcing.errors import (
    BundleError,
    CalibrationError,
    ConfigError,
    OutputError,
    RenderStopped,
)
from packforcing.export.oracle import Oracle, in_full, record
from packforcing.export.verify import verify
from packforcing.files import file_record
from packforcing.geometry import layer_matrices
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import DTYPES, contract, graph_file, read_manifest, write_manifest
from packforcing.runtime.engine_records import graph_files
from packforcing.runtime.estimate import weight_block
from packforcing.runtime.plan import choose_plan, make_plan
from packforcing.units import GIB
from tests.helpers import TINY, run_measured

DENOISER = graph_file("denoiser")
DEEP = msgspec.structs.replace(TINY, name="deep", layers=4, ffn_dim=384)
KINDS = ("int8", "int4", "fp8")
PROMPTS = ("a red star", "a blue square over sand")


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    """Four layers in fp16, of which two can be quantised."""
    from packforcing.config import Precision
    from packforcing.export import export_bundle
    from packforcing.model import random_weights

    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    config = msgspec.structs.replace(DEEP, precision=half)
    directory = tmp_path_factory.mktemp("bundles") / "deep"
    export_bundle(config, random_weights(config), directory)
    return directory


@pytest.fixture(scope="module")
def calibrated(half_bundle, tmp_path_factory):
    """Statistics of two videos."""
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    calibrate(half_bundle, PROMPTS, path, seconds=3)
    return path


@pytest.fixture(scope="module", params=KINDS)
def quantised(request, half_bundle, calibrated, tmp_path_factory):
    directory, kind = tmp_path_factory.mktemp("bundles") / request.param, request.param
    quantize_bundle(half_bundle, directory, kind, None, calibrated if kind == "fp8" else None)
    return directory


def weights(bundle) -> dict[str, np.ndarray]:
    """The layers' matrices and steps as a MatMul reads them, DequantizeLinear by its definition;
    halves are put together."""
    graph = ir.load(bundle / DENOISER).graph
    config = read_manifest(bundle).config
    found = {}
    for node in graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].const_value is not None:
            numbers, scale = (value.const_value.numpy().astype(np.float32) for value in node.inputs)
            if node.attributes["axis"].as_int() == 0:
                scale = np.repeat(scale, node.attributes["block_size"].as_int(), axis=0)
            name, _, half = str(node.inputs[0].name).rpartition(".")[0].partition(".half")
            read = np.stack([numbers * scale, scale + 0 * numbers])
            if half == "1":
                read = np.concatenate([found[name], read], 2 if "ffn.0" in name else 1)
            found[name] = read
    if found:
        return found
    return {
        name: stored(node.inputs[1]).const_value.numpy().astype(np.float32)
        for name, node in matrices(graph, config, quantised_layers(config)).items()
    }


def test_8_bits_are_off_by_half_a_step_at_most_and_int4_only_where_it_clips(half_bundle, quantised):
    """A step of fp8 is an eighth of the power of two below the number."""
    kind = read_manifest(quantised).config.precision.weights
    exact, found = weights(half_bundle), weights(quantised)
    assert exact.keys() == found.keys() and len(exact) == 8 * (DEEP.layers - 2)
    for name, matrix in exact.items():
        read, step = found[name]
        assert not np.array_equal(read, matrix)
        if kind == "fp8":
            _, exponent = np.frexp(matrix / step)
            step = step * np.maximum(2.0 ** (exponent - 4), 2**-9)
        within = np.abs(read - matrix) <= step * 0.501
        if kind == "int4":
            recipe = WEIGHTS[kind]
            numbers = np.rint(read / step)
            within |= (numbers == recipe.high) & (matrix > read)
            within |= (numbers == recipe.low) & (matrix < read)
        assert within.all(), name


def test_all_else_is_what_it_was(half_bundle, quantised):
    before, after = (ir.load(path / DENOISER).graph for path in (half_bundle, quantised))
    names = before.initializers.keys() & after.initializers.keys()
    changed = matrices(before, DEEP, quantised_layers(DEEP))
    kind = read_manifest(quantised).config.precision.weights
    halved = DEEP.layers - 2 if kind == "int4" else 0  # biases that widen are cut as well
    assert len(names) == len(before.initializers) - len(changed) - halved
    for name in names:
        one, two = (graph.initializers[name].const_value.numpy() for graph in (before, after))
        np.testing.assert_array_equal(one, two)
    old, new = read_manifest(half_bundle), read_manifest(quantised)
    assert new.graphs == old.graphs  # tensors between graphs are the same
    assert new.config == msgspec.structs.replace(
        old.config, precision=msgspec.structs.replace(old.config.precision, weights=kind)
    )
    others = [name for name in old.files if name != DENOISER]
    assert all(new.files[name] == old.files[name] for name in others)
    assert new.files[DENOISER].bytes < old.files[DENOISER].bytes


def test_halved_feed_forward_layers_give_what_whole_ones_do(half_bundle, tmp_path, monkeypatch):
    config = in_full(read_manifest(half_bundle).config)
    spec = contract(config)["denoiser"]
    oracles = {
        name: Oracle(half_bundle / graph_file(name), graph)
        for name, graph in contract(config).items()
    }
    call = record(config, oracles)["denoiser"][0]
    quantize_bundle(half_bundle, tmp_path / "halves", "int4")
    monkeypatch.setattr("packforcing.calibration.weights.halve", lambda found: found)
    quantize_bundle(half_bundle, tmp_path / "whole", "int4")
    counts, flows = [], []
    for name in ("whole", "halves"):
        graph = ir.load(tmp_path / name / DENOISER).graph
        counts.append(sum(node.op_type == "Gelu" for node in graph))
        oracle = Oracle(tmp_path / name / DENOISER, spec)
        flows.append(oracle.run(call.inputs)["flow"])
    assert counts == [DEEP.layers, 2 * DEEP.layers - 2]
    assert np.abs(flows[0] - flows[1]).max() < 1e-5 * np.abs(flows[0]).max()


def test_verify_passes_and_would_notice_activations_in_int8(quantised):
    """The oracle is the quantised graph in fp32. ONNX Runtime's own default is to round what
    quantised weights are multiplied with to int8: far more than is allowed."""
    found = verify(quantised)
    assert found.precision == read_manifest(quantised).config.precision
    assert found.missed == []


@pytest.mark.parametrize(("kind", "least"), [("int8", 35), ("int4", 15), ("fp8", 25)])
def test_the_demo_model_renders_with_quantised_weights(kind, least, tmp_path):
    out, prompts, statistics = (tmp_path / name for name in (kind, "prompts", "s.safetensors"))
    command = ["quantize", str(demo_bundle()), "--weights", kind, "--out", str(out), "--json"]
    if kind == "fp8":
        prompts.write_text("a red star over navy stripes\n")
        result = CliRunner().invoke(
            main, ["calibrate", str(demo_bundle()), "--prompts", str(prompts), "--seconds", "1",
                   "--out", str(statistics)],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        command += ["--calibration", str(statistics), "--cache", kind]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    ratios = list(said["snr"].values())
    assert ratios == sorted(ratios) and len(ratios) == {"int8": 32, "int4": 40, "fp8": 32}[kind]
    assert said["after"] < said["before"]
    videos = []
    for bundle in (demo_bundle(), out):
        with Session.open(bundle) as session:
            frames = session.stream("a green circle over gray dots", seconds=1)
            videos.append(np.concatenate(list(frames)).astype(np.float32))
    noise = np.mean(np.square(videos[0] - videos[1]))
    assert least < 10 * math.log10(255**2 / noise) < 80


# The cache


@pytest.fixture(scope="module", params=CACHE)
def small_cache(request, half_bundle, calibrated, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles") / "cache"
    quantize_bundle(half_bundle, directory, None, request.param, calibrated)
    return directory


def nothing(*channels: int) -> dict[str, np.ndarray]:
    """Statistics of keys and values that none were added to, by layer, head and channel."""
    return {
        f"{kind}.{what}": array
        for kind in "kv"
        for what, array in (
            ("largest", np.zeros(channels, np.float32)),
            ("counts", np.zeros((*channels, BINS), np.uint32)),
        )
    }


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_statistics_are_those_of_all_tokens_whatever_the_calls(calls, tokens, seed):
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((calls, 2, tokens, 4)).astype(np.float32) * 10 ** rng.uniform(-4, 2)
    found = nothing(3, 2, 4)
    for part in drawn:
        add(found, "k", 1, part)
    magnitude = np.abs(drawn).transpose(1, 3, 0, 2).reshape(2, 4, -1)
    np.testing.assert_array_equal(found["k.largest"][1], magnitude.max(-1))
    edges = 2.0 ** (np.arange(1, BINS) / OCTAVE + LOWEST)
    cumulated = (magnitude[..., None] < edges).sum(2)  # as many lie below each edge
    assert np.abs(found["k.counts"][1].cumsum(-1)[..., :-1] - cumulated).max() <= 1  # of rounding
    assert not found["k.largest"][[0, 2]].any() and not found["k.counts"][[0, 2]].any()


def test_a_scale_is_one_for_a_rope_pair_of_keys_and_reaches_the_largest_without_outliers():
    rng = np.random.default_rng(0)
    tokens = rng.uniform(-1, 1, (2, 1000, 4)) * [1, 3, 0.1, 20]
    found = nothing(1, 2, 4)
    for kind in "kv":
        add(found, kind, 0, tokens.astype(np.float32))
    steps = cache_steps(found, CACHE["int8"])
    largest = np.abs(tokens).max(1)
    np.testing.assert_allclose(steps["v"][0] * 127, largest, rtol=1e-6)
    pairs = largest.reshape(2, 2, 2).max(-1).repeat(2, -1)
    np.testing.assert_allclose(steps["k"][0] * 127, pairs, rtol=1e-6)


@pytest.mark.parametrize(("kind", "margin"), [("int8", 4), ("fp8", 2)])
def test_a_key_in_steps_is_a_number_in_fp16_though_its_channel_seemed_almost_dead(kind, margin):
    """A block's own keys are divided by their steps and not cut off."""
    found = nothing(1, 2, 4)
    for name in "kv":
        tokens = np.random.default_rng(0).uniform(-1, 1, (2, 1000, 4)) * [1e-6, 1e-6, 10, 0.01]
        add(found, name, 0, tokens.astype(np.float32))
    (steps,) = cache_steps(found, CACHE[kind])["k"]
    assert (margin * 10 / steps < np.finfo(np.float16).max).all()
    assert steps[:, 0] == pytest.approx(steps[:, 2] / 64)  # too small to cost anything


def test_a_cache_in_8_bits_is_the_rounded_one(half_bundle, small_cache, calibrated):
    """A step's new keys and values, times their steps, are the exact ones to half a step; and the
    flow from a context given in 8 bits is the flow from what these stand for."""
    config = read_manifest(small_cache).config
    number, recipe = np.dtype(DTYPES[config.precision.cache]), CACHE[config.precision.cache]
    plain, whole = contract(in_full(DEEP)), contract(config)["denoiser"]
    exact = Oracle(half_bundle / DENOISER, plain["denoiser"])
    spec = contract(in_full(config))["denoiser"]
    rounded = Oracle(small_cache / DENOISER, spec)
    rng = np.random.default_rng(1)
    sizes = {"N": DEEP.block_tokens, "C": 20}
    steps = cache_steps(statistics_for(calibrated, read_manifest(half_bundle)), recipe)
    inputs, meant = {}, {}
    for tensor in whole.inputs:
        shape = [sizes.get(str(n), n) for n in tensor.shape]
        if tensor.dtype == number:
            inputs[tensor.name] = rng.integers(-127, 128, shape).astype(number)
            kind, layer = tensor.name[0], int(tensor.name.rpartition(".")[2])
            step = steps[kind][layer].astype(np.float16)[:, None].astype(np.float32)
            meant[tensor.name] = inputs[tensor.name].astype(np.float32) * step
        else:
            meant[tensor.name] = inputs[tensor.name] = rng.standard_normal(shape).astype(
                tensor.dtype
            )
    for given_ in (inputs, meant):
        given_["kv_len"] = np.array([sum(sizes.values())], np.int64)
        given_["timestep"] = np.array([500], np.float32)
    wanted, found = exact.run(meant), rounded.run(inputs)
    np.testing.assert_allclose(found["flow"], wanted["flow"], atol=1e-4)
    for layer in range(DEEP.layers):
        for kind in "kv":
            name, step = f"{kind}_new.{layer}", steps[kind][layer][:, None]
            assert found[name].dtype == number
            lowest = -128 if number == np.int8 else recipe.low  # the node's own
            ideal = np.clip(wanted[name] / step, lowest, recipe.high)
            # to half a step, of fp8 a sixteenth of the number; and the inverse is one in fp16
            allowed = 0.5 if number == np.int8 else np.maximum(np.abs(ideal) / 16, 2**-10)
            off = np.abs(found[name].astype(np.float32) - ideal)
            assert (off <= allowed + 0.002 * recipe.high).all()


def test_the_runtime_keeps_a_cache_and_an_archive_of_8_bits(half_bundle, small_cache):
    from packforcing.runtime.allocations import memory_by_purpose

    config = read_manifest(small_cache).config
    number = DTYPES[config.precision.cache]
    sizes = [
        memory_by_purpose(read_manifest(bundle).config)["context"]
        for bundle in (half_bundle, small_cache)
    ]
    assert sizes[0] == 2 * sizes[1]
    with Session.open(small_cache) as session:
        frames = list(session.stream("a red star", seconds=4))
        rollout = session.rollout
        assert rollout is not None
        assert rollout.archive.key_values.dtype == number
        assert rollout.archive.key_values.view(np.int8).any()
        assert rollout.buffers.context.dtype == number
    assert len(np.concatenate(frames)) == config.frames(4)
    assert verify(small_cache).missed == []


@pytest.mark.parametrize(("weights", "cache"), [("int4", "int8"), ("int8", "fp8"), ("fp8", "fp8")])
def test_weights_and_cache_go_together(weights, cache, half_bundle, calibrated, tmp_path):
    quantize_bundle(half_bundle, tmp_path / "both", weights, cache, calibrated)
    found = verify(tmp_path / "both")
    write_reports(tmp_path, found)
    assert (found.precision.weights, found.precision.cache) == (weights, cache)
    assert found.missed == []
    with Session.open(tmp_path / "both") as session:
        assert np.concatenate(list(session.stream(PROMPTS[0], seconds=3))).std() > 1


def test_a_render_with_an_8_bit_cache_goes_on_where_it_was_stopped(small_cache, tmp_path):
    asked = {"prompt": "a red star", "seconds": 9, "checkpoint_seconds": 3.0}
    with Session.open(small_cache) as session:
        session.render(path=tmp_path / "whole.mp4", **asked)

        def stop(info):
            if info.index == 4:
                session.stop()

        path = tmp_path / "parts.mp4"
        with pytest.raises(RenderStopped):
            session.render(path=path, on_block=stop, **asked)
        summary = session.render(path=path, resume=True, **asked)
    assert summary.frames_resumed > 0
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_what_matrices_are_multiplied_with_is_what_the_reference_multiplies(
    tiny_model, tiny_bundle, tmp_path
):
    """By hooks on the PyTorch model's own rollout, matrix by matrix."""
    import torch

    from packforcing.reference import rollout
    from packforcing.sampler import draw_noise
    from packforcing.words import encode_words

    prompt, seed, seconds = "a red star", 4, 11
    path = tmp_path / "s.safetensors"
    source = calibrate(tiny_bundle, [prompt], path, seconds=seconds, seed=seed)
    found = statistics_for(path, read_manifest(tiny_bundle))
    products, largest, tokens = {}, {}, []

    def hook(name, module, inputs):
        rows = inputs[0][0].numpy()
        if name == "blocks.0.ffn.0":
            tokens.append(len(rows))
        parts = rows.reshape(len(rows), -1, math.gcd(rows.shape[1], 128)).astype(np.float64)
        products[name] = products.get(name, 0) + np.einsum("nib,nic->ibc", parts, parts)
        largest[name] = np.maximum(largest.get(name, 0), np.abs(rows).max(0))

    modules = [
        module.register_forward_pre_hook(partial(hook, name))
        for name, module in tiny_model.transformer.named_modules()
        if name.startswith("blocks.") and not name.endswith(("cross_attn.k", "cross_attn.v"))
        if isinstance(module, torch.nn.Linear)
    ]
    text = torch.from_numpy(encode_words(prompt, TINY))
    noise = lambda block, step: draw_noise(TINY, seed, block, step)  # noqa: E731
    with torch.no_grad():
        list(rollout(tiny_model, text, source.blocks, noise, seed=seed))
    for module in modules:
        module.remove()
    assert len(products) == 8 * TINY.layers
    for name, wanted in products.items():
        _, layer, matrix = name.split(".", 2)
        mean, wanted = mean_products(found, int(layer), matrix), wanted / sum(tokens)
        np.testing.assert_allclose(mean, wanted, 1e-2, 1e-2 * wanted.max(), err_msg=name)
        read_by = matrix if f"{matrix}.largest" in found else "self_attn.q"
        np.testing.assert_allclose(
            found[f"{read_by}.largest"][:, int(layer)].max(0), largest[name], rtol=1e-2
        )
    steps, blocks = len(TINY.timesteps), source.blocks
    full, small = blocks * TINY.block_tokens, (blocks - TINY.policy.sink) * TINY.compressed_tokens
    assert blocks > TINY.policy.capacity
    assert found["tokens"].tolist() == [full] * (steps + 1) + [small]
    assert source.calls == calls(TINY) and len(source.calls) == steps + 2
    assert sum(tokens) == found["tokens"].sum()


def test_a_cache_fitted_to_few_prompts_is_warned_of(half_bundle, calibrated, tmp_path):
    def stderr(*args):
        result = CliRunner().invoke(main, list(map(str, args)))
        assert result.exit_code == 0, result.output
        return result.stderr

    small = "--cache", "int8", "--calibration", calibrated, "--out", tmp_path / "small"
    warning = stderr("quantize", half_bundle, *small, "--json")
    assert re.match(r"warning: statistics of 2 prompts: .* with \d+ or more\n$", warning)
    source, found = read(calibrated)
    many = msgspec.structs.replace(source, prompts=["x"] * ENOUGH, done=ENOUGH)
    save_file(found, tmp_path / "s", {SOURCE: msgspec.json.encode(many).decode()})
    small = "--cache", "int8", "--calibration", tmp_path / "s", "--out", tmp_path / "other"
    assert stderr("quantize", half_bundle, *small) == ""
    few = "--weights", "int4", "--calibration", calibrated, "--out", tmp_path / "four"
    assert stderr("quantize", half_bundle, *few, "--json") == ""  # of weights alone
    (tmp_path / "p").write_text("\n".join(PROMPTS))
    again = "--prompts", tmp_path / "p", "--out", calibrated, "--seconds", 3
    assert stderr("calibrate", half_bundle, *again, "--json") == warning


def test_losses_of_outputs_are_those_of_the_reference(tmp_path):
    """Two transformers in PyTorch, side by side on the reference's own rollout: one with the
    weights that were exported, one with what quantised numbers stand for; what the second reads of
    the history, and what it leaves behind, is in whole steps."""
    import torch

    from packforcing.calibration.output_error import output_losses
    from packforcing.export import export_bundle
    from packforcing.export.oracle import PROMPT, SEED, recorded_blocks
    from packforcing.model import random_model
    from packforcing.reference import rollout
    from packforcing.sampler import draw_noise
    from packforcing.words import encode_words

    exact, rough, eight = random_model(DEEP), random_model(DEEP), tmp_path / "eight"
    export_bundle(DEEP, exact.weights(), tmp_path / "deep")
    calibrate(tmp_path / "deep", PROMPTS, tmp_path / "s.safetensors", seconds=3)
    quantize_bundle(tmp_path / "deep", eight, "int8", "int8", tmp_path / "s.safetensors")
    steps = cache_steps(read(tmp_path / "s.safetensors")[1], CACHE["int8"])
    for name, (matrix, _) in weights(eight).items():
        weight = rough.transformer.get_parameter(f"{name}.weight")
        weight.copy_(torch.from_numpy(matrix.T.copy()))
    signal, noise = {}, {}

    def whole(tokens, kind, layer):
        step = torch.from_numpy(steps[kind][layer][:, None].copy())
        return (tokens / step).round().clamp(-128, 127) * step

    def beside(module, given_, outputs):
        tokens, extra, time, cross, rope, context, context_rope = given_
        read_ = [
            tuple(map(whole, pair, "kv", (layer, layer))) for layer, pair in enumerate(context)
        ]
        found = rough.transformer(tokens, extra, time, cross, rope, read_, context_rope)
        pairs = {"flow": (outputs[0], found[0])}
        if time == 0:
            pairs = {"q_pool": (outputs[2], found[2]), "k_pool": (outputs[3], found[3])}
            for layer, (new, old) in enumerate(zip(found[1], outputs[1])):
                for kind, a, b in zip("kv", old, new):
                    pairs[f"{kind}_new.{layer}"] = a, whole(b, kind, layer)
        for name, (a, b) in pairs.items():
            signal[name] = signal.get(name, 0) + a.double().square().sum().item()
            noise[name] = noise.get(name, 0) + (a - b).double().square().sum().item()

    exact.transformer.register_forward_hook(beside)
    text, blocks = torch.from_numpy(encode_words(PROMPT, DEEP)), recorded_blocks(DEEP)[1] + 1
    noise_of = lambda block, step: draw_noise(DEEP, SEED, block, step)  # noqa: E731
    list(rollout(exact, text, blocks, noise_of, seed=SEED))
    found = output_losses(tmp_path / "deep", {"eight": eight, "same": tmp_path / "deep"})
    assert found["eight"].keys() == signal.keys()
    for name, loss in found["eight"].items():
        assert loss.snr == pytest.approx(10 * math.log10(signal[name] / noise[name]), abs=0.1), name
        assert loss.error == pytest.approx((noise[name] / signal[name]) ** 0.5, rel=0.02), name
    assert all(loss == Loss(None, 0.0) for loss in found["same"].values())
    backwards = output_losses(eight, {"deep": tmp_path / "deep"})["deep"]
    assert backwards["flow"].snr == pytest.approx(found["eight"]["flow"].snr, abs=1)


def test_calibration_goes_on_where_it_was_interrupted(half_bundle, calibrated, tmp_path):
    path = tmp_path / "s.safetensors"

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(half_bundle, PROMPTS, path, seconds=3, on_block=stop)
    assert read(path)[0].done == 1
    with pytest.raises(CalibrationError, match="1 of 2 rollouts"):
        statistics_for(path, read_manifest(half_bundle))
    calibrate(half_bundle, PROMPTS, path, seconds=3)
    (one, found), (two, wanted) = read(path), read(calibrated)
    assert one == two
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("largest", [6e4, 1.0, 1e-3, 1e-6, 1e-9])
def test_a_cache_keeps_channels_of_any_size(largest, kind):
    """In fp16 a step has a smallest size, below which a GPU might take it for zero. A key goes
    into attention in steps, and is a number there."""

    def value(name, *shape):
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT16))

    new, context, given, query = (
        value(name, 1, 1, 3, 2) for name in (f"{kind}_new.0", f"{kind}_ctx.0", "given", "query")
    )
    cos, sin, seen = value("cos", 1, 3, 1), value("sin", 1, 3, 1), value("seen", 1, 1, 3, 2)
    nodes = [ir.node("Identity", [given], outputs=[new])]
    if kind == "k":
        turned = [
            ir.node("RotaryEmbedding", [x, cos, sin], {"interleaved": 1})
            for x in (query, new, context)
        ]
        join = ir.node("Concat", [node.outputs[0] for node in turned[1:]], {"axis": 2})
        inputs = [turned[0].outputs[0], join.outputs[0], join.outputs[0]]
        nodes += [*turned, join, ir.node("Attention", inputs, outputs=[seen])]
    else:
        nodes.append(ir.node("Identity", [context], outputs=[seen]))
    ends = [given, context, query, cos, sin], [new, seen]
    graph = ir.Graph(*ends, nodes=nodes, opset_imports={"": 24}, name="g")
    step = np.full((1, 2), largest / 127, np.float32)
    quantize_cache(graph, f"{kind}_new.0", f"{kind}_ctx.0", step, "int8")
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    )
    values = np.float16([[0, largest], [-largest, largest / 3], [largest / 2, -largest]])[
        None, None
    ]
    fed = {"given": values, "query": np.ones_like(values)}
    fed |= {"cos": np.ones((1, 3, 1), np.float16), "sin": np.zeros((1, 3, 1), np.float16)}
    whole, _ = session.run(None, {**fed, f"{kind}_ctx.0": np.zeros(values.shape, np.int8)})
    _, back = session.run(None, {**fed, f"{kind}_ctx.0": whole})
    step = max(largest / 127, 2**-14)
    if kind == "k":
        assert np.isfinite(back).all()
        back = whole * np.float16(step)
    np.testing.assert_allclose(back.astype("f"), values.astype("f"), atol=0.51 * step, rtol=2e-3)


def test_calibrating_into_no_folder_is_refused_at_once(half_bundle, tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        calibrate(half_bundle, ["a red star"], tmp_path / "none" / "s.safetensors", seconds=3)


def test_statistics_that_will_not_do_are_refused(half_bundle, calibrated, tmp_path):
    with pytest.raises(CalibrationError, match="--calibration"):
        quantize_bundle(half_bundle, tmp_path / "out", None, "int8")
    with pytest.raises(CalibrationError, match=r"what weights are multiplied .* --calibration"):
        quantize_bundle(half_bundle, tmp_path / "out", "fp8")
    with pytest.raises(CalibrationError, match="cannot read statistics"):
        quantize_bundle(half_bundle, tmp_path / "out", None, "int8", tmp_path / "none.safetensors")
    with pytest.raises(CalibrationError, match="of another model"):
        quantize_bundle(demo_bundle(), tmp_path / "out", None, "int8", calibrated)
    with pytest.raises(CalibrationError, match="another model or other prompts"):
        calibrate(half_bundle, ["a red star"], calibrated, seconds=3)
    with pytest.raises(CalibrationError, match="no prompts"):
        calibrate(half_bundle, [], tmp_path / "s.safetensors")
    with pytest.raises(ConfigError, match="nothing to quantise"):
        quantize_bundle(half_bundle, tmp_path / "out")
    source, found = read(calibrated)
    path = tmp_path / "s.safetensors"
    about = {SOURCE: msgspec.json.encode(source).decode()}
    save_file({**found, "tokens": found["tokens"][1:]}, path, about)
    with pytest.raises(CalibrationError, match="does not hold what it says"):
        quantize_bundle(half_bundle, tmp_path / "out", "int4", None, path)
    found["cross_attn.o.moments"][2] = 0
    save_file(found, path, about)
    with pytest.raises(CalibrationError, match=r"what blocks\.2\.cross_attn\.o is mul.* was zero"):
        quantize_bundle(half_bundle, tmp_path / "out", "int4", None, path)
    found["v.largest"][1, 0, 3] = 0
    with pytest.raises(CalibrationError, match="v of layer 1, head 0, channel 3 was zero"):
        cache_steps(found, CACHE["int8"])
    with pytest.raises(ValueError, match="k of layer 0, head 1, channel 2"):
        tokens = np.zeros((2, 5, 4), np.float32)
        tokens[1, 3, 2] = np.nan
        add(nothing(1, 2, 4), "k", 0, tokens)
    assert not (tmp_path / "out").exists()


def test_a_rollout_that_is_no_number_names_call_and_matrix(half_bundle, tmp_path):
    broken = shutil.copytree(half_bundle, tmp_path / "broken")
    model = ir.load(broken / DENOISER)
    name = next(n for n in model.graph.initializers if "blocks.2.self_attn.v.bias" in n)
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    array[1] = np.nan
    value.const_value = ir.tensor(array, name=name)
    ir.save(model, broken / DENOISER)
    manifest = read_manifest(broken)
    manifest.files[DENOISER] = file_record(broken / DENOISER)
    write_manifest(broken, manifest)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\n")
    out = tmp_path / "s.safetensors"
    result = CliRunner().invoke(
        main, ["calibrate", str(broken), "--prompts", str(prompts), "--out", str(out)]
    )
    assert result.exit_code == 2
    where = "step 1 of block 0 of 'a red star': channel 1 of what blocks.2.self_attn.o is multip"
    assert f"no number in {where}" in result.stderr
    assert not out.exists()


# Arithmetic


@given(
    hnp.arrays(np.float32, (8, 3), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(["int8", "int4"]),
    st.sampled_from([4, 8]),
)
def test_no_weight_has_a_larger_error_than_the_least_clipping_leaves(matrix, kind, block):
    """Constant and empty channels included; int4 is at least as good as without clipping."""
    recipe = WEIGHTS[kind]
    scale, snr = scales(matrix, block, recipe, np.dtype(np.float16), "w")
    assert scale.shape == (8 // block, 3) and (scale > 0).all()
    step = np.repeat(scale.astype(np.float64), block, axis=0)
    read = np.clip(np.rint(matrix / step), recipe.low, recipe.high) * step
    largest = np.abs(matrix).reshape(-1, block, 3).max(1)
    plain = np.maximum((largest / recipe.high).astype(np.float16), np.float16(6e-8))
    coarse = np.repeat(plain.astype(np.float64), block, axis=0)
    rough = np.clip(np.rint(matrix / coarse), recipe.low, recipe.high) * coarse
    assert ((read - matrix) ** 2).sum() <= ((rough - matrix) ** 2).sum() * 1.001 + 1e-9
    assert snr > 0 or not matrix.any() or np.abs(matrix).max() < 1e-5


def test_every_number_in_fp8_is_rounded_to_the_nearest_that_there_is():
    """The format by its definition: a sign, 4 bits of exponent less 7, 3 of mantissa; OCP 8-bit
    floating point specification, E4M3."""
    codes = np.arange(127)  # the last one is NaN
    exponent, mantissa = codes >> 3, codes & 7
    normal = 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    known = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    known = np.concatenate([-known[::-1], known])
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-500, 500, 400), rng.normal(0, 0.05, 400), known])
    found = rounded(
        values[:, None].astype(np.float32), len(values), np.ones((1, 1)), WEIGHTS["fp8"]
    ).ravel()
    nearest = np.abs(np.clip(values, -448, 448)[:, None] - known).min(1)
    assert np.isin(found, known).all()
    np.testing.assert_allclose(np.abs(found - np.clip(values, -448, 448)), nearest, atol=1e-6)


@pytest.mark.parametrize("alike", [0, 30])
def test_int4_fits_what_it_is_multiplied_with(alike):
    """Channels of very different size, which may go together: the error of the products, on the
    very inputs that the mean products are of, is less than with scales that fit the weights alone,
    and where they go together, than with those that take each channel by itself."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_t(3, (256, 64)).astype(np.float32)
    given_ = rng.standard_normal((4000, 256)) * np.exp(rng.normal(0, 2, 256))
    given_ = (given_ + alike * rng.standard_normal((4000, 1))).astype(np.float32)
    parts = given_.reshape(4000, 2, 128)
    together = np.einsum("nib,nic->ibc", parts, parts) / np.float32(4000)
    alone = together * np.eye(128, dtype=np.float32)
    noise = {}
    for name, read_ in (("weights", None), ("channels", alone), ("products", together)):
        scale, snr = scales(matrix, 128, WEIGHTS["int4"], np.dtype(np.float32), "w", read_)
        error = rounded(matrix, 128, scale, WEIGHTS["int4"]) * scale[:, None]
        error = error.reshape(matrix.shape) - matrix
        noise[name] = np.square(given_ @ error).mean()
    exact = np.square(given_ @ matrix).mean()
    assert noise["products"] < 0.8 * noise["weights"]
    assert noise["products"] < (0.8 if alike else 1.05) * noise["channels"]
    assert snr == pytest.approx(10 * math.log10(exact / noise["products"]), abs=0.5)


def test_blocks_are_never_cut():
    assert [weight_block("int4", *shape) for shape in ((192, 640), (640, 192))] == [64, 128]
    assert [weight_block("int4", *shape) for shape in ((1536, 8960), (8960, 1536))] == [128, 128]
    assert [weight_block("int8", *shape) for shape in ((192, 640), (640, 192))] == [96, 640]
    assert [weight_block("fp8", *shape) for shape in ((192, 640), (640, 192))] == [192, 640]


def test_a_graph_with_its_weights_beside_it_can_become_one_without(
    half_bundle, tmp_path, monkeypatch
):
    source = shutil.copytree(half_bundle, tmp_path / "large")
    model = ir.load(source / DENOISER)
    ir.save(model, source / DENOISER, external_data=f"{DENOISER}.data")
    manifest = read_manifest(source)
    for name in (DENOISER, f"{DENOISER}.data"):
        manifest.files[name] = file_record(source / name)
    write_manifest(source, manifest)
    quantize_bundle(source, tmp_path / "inside", "int8")
    monkeypatch.setattr("packforcing.export.exporter.INLINE_BYTES", 1000)
    quantize_bundle(source, tmp_path / "beside", "int8")
    assert f"{DENOISER}.data" not in read_manifest(tmp_path / "inside").files
    assert f"{DENOISER}.data" in read_manifest(tmp_path / "beside").files
    videos = []
    for name in ("inside", "beside"):
        with Session.open(tmp_path / name) as session:
            videos.append(np.concatenate(list(session.stream("a red star", seconds=0.5))))
    np.testing.assert_array_equal(*videos)


def test_mistakes_are_explained(half_bundle, quantised, tiny_bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"has weights in (int|fp)[48] already"):
        quantize_bundle(quantised, tmp_path / "out", "int8")
    with pytest.raises(CalibrationError, match=r"has weights in (int|fp)[48] already"):
        calibrate(quantised, PROMPTS, tmp_path / "s.safetensors")
    with pytest.raises(ConfigError, match="choose another folder"):
        quantize_bundle(half_bundle, half_bundle, "int8")
    with pytest.raises(ConfigError, match="no layer between its first and its last"):
        quantize_bundle(tiny_bundle, tmp_path / "out", "int8")
    broken = shutil.copytree(half_bundle, tmp_path / "broken")
    model = ir.load(broken / DENOISER)
    product = matrices(model.graph, DEEP, quantised_layers(DEEP))["blocks.1.self_attn.q"]
    value = stored(product.inputs[1])
    array = value.const_value.numpy().copy()
    array[3, 5] = np.nan
    value.const_value = ir.tensor(array, name=value.name)
    ir.save(model, broken / DENOISER)
    with pytest.raises(BundleError, match="damaged"):
        quantize_bundle(broken, tmp_path / "out", "int8")
    manifest = read_manifest(broken)
    manifest.files[DENOISER] = file_record(broken / DENOISER)
    write_manifest(broken, manifest)
    with pytest.raises(BundleError, match=r"blocks\.1\.self_attn\.q holds weights that are no num"):
        quantize_bundle(broken, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(
        main, ["quantize", str(quantised), "--weights", "int8", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2 and "already" in result.stderr


# Against the builder


def test_fp8_is_built_for_cards_that_have_it_and_refused_for_others(
    half_bundle, calibrated, tmp_path
):
    pytest.importorskip("tensorrt_rtx")
    from packforcing.export.engines import build_engines

    quantize_bundle(half_bundle, tmp_path / "eight", "fp8", "fp8", calibrated)
    with pytest.raises(ConfigError, match="sm86 has no fp8 for the weights; it has fp32, fp16, in"):
        build_engines(tmp_path / "eight")
    assert not (tmp_path / "eight" / "engines").exists()
    built = build_engines(tmp_path / "eight", ["sm89", "sm120"])
    assert built["denoiser"].key.targets == ("sm89", "sm120")


def made_up(bundle, path):
    """Statistics of a model that is too large to be rolled out here."""
    manifest, rng = read_manifest(bundle), np.random.default_rng(0)
    source = Source(
        model=manifest.config.name,
        denoiser=graph_files(manifest, "denoiser"),
        prompts=["none"],
        seed=0,
        blocks=1,
        calls=calls(manifest.config),
        done=1,
    )
    found = {
        name: rng.uniform(1, 4, shape).astype(dtype)
        for name, (shape, dtype) in forms(manifest.config).items()
    }
    for name in found:
        if name.endswith(".moments"):  # of some inputs: no sum of products is negative otherwise
            found[name] = found[name] @ found[name].swapaxes(-1, -2)
    save_file(found, path, {SOURCE: msgspec.json.encode(source).decode()})
    return path


@pytest.mark.full
@pytest.mark.parametrize("layers", [4, 30])
def test_an_engine_takes_a_byte_or_half_of_one_for_a_quantised_weight(layers, tmp_path, capsys):
    """And no more scratch than in fp16; less of it with a cache in 8 bits, as keys are nowhere
    both whole and in steps. On few layers the builder makes another choice, so that is asked of
    the whole model alone. Quantising takes 6 GB of memory at most; how long it took is printed."""
    pytest.importorskip("tensorrt_rtx")
    from packforcing.export import export_bundle
    from packforcing.export.engines import build_engines
    from packforcing.model import random_weights

    config = msgspec.structs.replace(MODELS["wan-1.3b"], layers=layers)
    export_bundle(config, random_weights(config), tmp_path / "fp16")
    statistics = made_up(tmp_path / "fp16", tmp_path / "s.safetensors")
    built, lines = {}, []
    cached = (None, "int8"), ("int8", "int8"), ("int4", "int8"), ("fp8", "fp8")
    for weights, cache in ((None, None), *((weights, None) for weights in KINDS), *cached):
        kind = ", ".join(filter(None, (weights, cache and f"cache {cache}"))) or "fp16"
        if kind != "fp16":
            options = [
                f"--{what}={of}" for what, of in (("weights", weights), ("cache", cache)) if of
            ]
            given_ = *options, "--calibration", statistics, "--out", tmp_path / kind
            _, seconds, peak = run_measured("quantize", tmp_path / "fp16", *given_)
            lines.append(f"quantize to {kind}: {seconds:.0f} s, {peak / 1e9:.2f} GB of memory")
            assert peak <= 6e9
        targets = ["sm89", "sm120"] if "fp8" in kind else None  # not the third one
        built[kind] = build_engines(tmp_path / kind, targets)["denoiser"]
    count = sum(map(math.prod, layer_matrices(config))) * (layers - 2)
    rest = built["fp16"].weights - 2 * count
    scratch = {kind: max(record.scratch.values()) for kind, record in built.items()}
    taken = {kind: (built[kind].weights - rest) / count for kind in KINDS}
    with capsys.disabled():
        print("", *lines, sep="\n")
        print(f"{layers} layers: bytes per quantised weight {taken}, scratch {scratch}")
        print("weights", {kind: record.weights for kind, record in built.items()})
    assert taken["int8"] == pytest.approx(1, rel=0.02)
    assert taken["fp8"] == pytest.approx(1, rel=0.02)
    assert taken["int4"] == pytest.approx(0.52, rel=0.02)
    with_cache = {kind: scratch.pop(kind) for kind in list(scratch) if "cache" in kind}
    assert max(scratch.values()) == scratch["fp16"]
    if config == MODELS["wan-1.3b"]:
        assert all(size < scratch["fp16"] for size in with_cache.values())


@pytest.mark.full
def test_the_whole_history_of_the_full_model_fits_into_4_gib_by_what_was_built(tmp_path, capsys):
    """In the precision and with the autoencoder that the plan for 4 GiB names."""
    pytest.importorskip("tensorrt_rtx")
    from packforcing.export import export_bundle
    from packforcing.export.engines import build_engines
    from packforcing.model import random_weights

    planned = choose_plan(MODELS["wan-1.3b"], "sm86", 4 * GIB)
    config, precision = planned.config, planned.config.precision
    assert config.policy == MODELS["wan-1.3b"].policy and not planned.streamed
    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    exact = msgspec.structs.replace(config, precision=half)
    export_bundle(exact, random_weights(exact), tmp_path / "fp16")
    statistics = made_up(tmp_path / "fp16", tmp_path / "s.safetensors")
    small = tmp_path / "small"
    quantize_bundle(tmp_path / "fp16", small, precision.weights, precision.cache, statistics)
    records = build_engines(small, ["sm86", "sm89", "sm120"])
    built = {name: size for record in records.values() for name, size in record.figures.items()}
    scratch = max(records["denoiser"].scratch.values()) / 1e6
    lines = [
        f"{precision.weights} weights, {precision.cache} cache: {scratch:.1f} MB of scratch, "
        "GiB by the built figures"
    ]
    for target in ("sm86", "sm89", "sm120"):
        total = make_plan(config, target, built=built).total
        lines.append(f"{target}: {total / GIB:.3f} (planned {planned.total / GIB:.3f})")
        assert total <= 4 * GIB
    with capsys.disabled():
        print("", *lines, sep="\n")

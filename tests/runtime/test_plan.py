"""The memory plan: arithmetic against the modules themselves, against what is allocated, against
what a builder reports; and the rules by which a plan is chosen."""

import math

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing import Policy
from packforcing.config import Precision
from packforcing.errors import ConfigError, PlanError
from packforcing.geometry import operations
from packforcing.runtime.allocations import MID_PASS_SHARED, allocations, memory_by_purpose
from packforcing.runtime.archive import Archive
from packforcing.runtime.buffers import Buffers
from packforcing.runtime.bundle import GPU_GRAPHS, contract
from packforcing.runtime.device import HostDevice
from packforcing.runtime.estimate import (
    calls_per_block,
    seconds_per_block,
    tensor_bytes,
    weight_bytes,
)
from packforcing.runtime.gpus import find_gpu
from packforcing.runtime.plan import (
    JETSON_TARGETS,
    RESERVE,
    STREAMED,
    TARGETS,
    choose_plan,
    describe,
    estimates,
    make_plan,
    plans,
    precisions,
    smallest,
)
from packforcing.sampler import StepOverrides
from packforcing.transformer import Transformer
from packforcing.units import GIB
from tests.emulated import Cuda, cuda_device
from tests.helpers import CONFIGS, TINY, WAN, builder_figures, is_close_estimate, is_prompt_weight


def with_(config, **changes):
    """The config with other fields; `weights` and `cache` are those of its precision."""
    formats = {name: changes.pop(name) for name in ("weights", "cache") if name in changes}
    precision = msgspec.structs.replace(config.precision, **formats)
    return msgspec.structs.replace(config, precision=precision, **changes)


@pytest.mark.parametrize("kind", ["fp16", "int8", "w8a8", "fp8", "int4", "nvfp4"])
def test_quantized_weights_count_their_scales(kind):
    """Matrices of all layers but the outer two are quantised: a fp16 scale per output channel,
    in int8 two where the matrix widens, or in int4 one per 128 weights; in nvfp4 one of a byte per
    16. All else is fp16."""
    with torch.device("meta"):
        transformer = Transformer(WAN)
    expected = 0
    for name, tensor in transformer.named_parameters():
        inner = name.startswith("blocks.") and 0 < int(name.split(".")[1]) < WAN.layers - 1
        if is_prompt_weight(name):
            continue
        if kind == "fp16" or not inner or tensor.ndim != 2:
            expected += 2 * tensor.numel()
        elif kind == "int4":
            expected += tensor.numel() // 2 + 2 * tensor.numel() // 128
        elif kind == "nvfp4":
            expected += tensor.numel() // 2 + tensor.numel() // 16
        else:
            two = kind == "int8" and len(tensor) > tensor.shape[1]
            expected += tensor.numel() + 2 * len(tensor) * (1 + two)
    assert weight_bytes(with_(WAN, weights=kind))["denoiser"] == expected


@pytest.mark.parametrize("config", [TINY, CONFIGS["low branch"]], ids=["both", "low branch"])
@pytest.mark.parametrize("precision", [
    Precision(), Precision(compute="fp16", weights="int4", cache="int8"),
    Precision(compute="fp16", weights="fp16", cache="fp16"),
])  # fmt: skip
def test_a_plan_is_what_the_runtime_allocates(config, precision):
    """To the byte, on a GPU, in pinned memory and on the host, whatever the dtypes."""
    config = msgspec.structs.replace(config, precision=precision)
    plan = make_plan(config, "sm86")
    cuda, host = Cuda(), HostDevice()
    device = cuda_device(cuda)
    buffers = Buffers(config, device), Buffers(config, host)
    rows = {"context": "cache.", "staging": "staging."}  # of some purposes a plan has several
    assert dict(device.allocated) == {
        purpose: sum(
            size
            for name, size in plan.device.items()
            if name.startswith(rows.get(purpose, purpose))
        )
        for purpose in device.allocated
    }
    planned = [n for n in plan.device if not n.startswith(("weights.", "scratch", "reserve"))]
    assert cuda.used("device") == sum(plan.device[name] for name in planned)
    assert device.host.allocated.total() == plan.host["copies"]
    on_host = memory_by_purpose(config)
    del on_host["archive_per_block"]
    assert host.allocated == on_host
    blocks = config.blocks(config.frames(60))
    archive = Archive(config, blocks)
    assert archive.key_values.nbytes + archive.pooled_keys.nbytes == plan.host["archive"]
    del buffers


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_allocations_have_unique_names_and_no_array_twice(config):
    """Every tensor of the contract has one array, but for what the mid pass shares."""
    names = [entry.name for entry in allocations(config)]
    assert len(names) == len({*names})
    assert not {f"mid_pass.{name}" for name in MID_PASS_SHARED} & {*names}
    graph = contract(config)["denoiser"]
    plain = {t.name for t in (*graph.inputs, *graph.outputs) if "." not in t.name}
    assert {n.removeprefix("denoiser.") for n in names if n.startswith("denoiser.")} == plain


def test_the_full_history_of_the_full_model():
    """27,872 tokens at 480x832 in blocks of 4, as the design has it, in GiB."""
    assert WAN.context_tokens + WAN.block_tokens == 27_872

    def rounded(config, *rows):
        device = make_plan(config, "sm86").device
        total = sum(size for row, size in device.items() if row.startswith(rows))
        return round(total / GIB, 2)

    assert rounded(WAN, "cache.", "staging.block") == 4.78
    assert rounded(with_(WAN, cache="int8"), "cache.", "staging.block") == 2.39
    assert rounded(WAN, "weights.denoiser") == 2.36
    assert rounded(WAN, "cross_attention") == 0.09
    one_sink = with_(WAN, cache="int8", policy=Policy(sink=1, mid=16, recent=1))
    assert rounded(one_sink, "cache.sink") == 0.54


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_total_is_the_sum_of_the_rows(config):
    plan = make_plan(config, "sm86", seconds=30)
    assert plan.total == sum(plan.device.values())
    assert plan.device["reserve"] == RESERVE
    assert plan.device["scratch"] >= tensor_bytes(config)["vae_decoder"]["frames"] // 2
    longer = make_plan(config, "sm86", seconds=60)
    assert longer.device == plan.device and longer.host["archive"] > plan.host["archive"]


def test_measured_figures_replace_the_estimates():
    built = {"weights.denoiser": 7, "scratch.vae_decoder": 10**12}
    plan, estimated = make_plan(WAN, "sm86", built=built), make_plan(WAN, "sm86")
    assert plan.device == {**estimated.device, "weights.denoiser": 7, "scratch": 10**12}


SMALL = with_(TINY, layers=5, policy=Policy(sink=2, mid=3, recent=1))


def rank(config, target, plan):
    """Where a plan stands in the order of what is given up."""
    for place, candidate in enumerate(plans(config, target, 10**15)):
        if candidate.config == plan.config:
            return place, plan.streamed
    raise AssertionError(describe(plan))


@settings(deadline=None)
@given(
    target=st.sampled_from(sorted(TARGETS)),
    budgets=st.tuples(*2 * [st.floats(0.97, 1.02)]),
)
def test_more_memory_never_gives_a_worse_plan(target, budgets):
    whole = make_plan(SMALL, target).total
    ranks = []
    for budget in sorted(int(share * whole) for share in budgets):
        try:
            plan = choose_plan(SMALL, target, budget)
        except PlanError:
            ranks.append((math.inf, 0))
            continue
        assert plan.total <= budget
        assert plan.streamed <= STREAMED * weight_bytes(plan.config)["denoiser"]
        ranks.append(rank(SMALL, target, plan))
    assert ranks[0] >= ranks[1]


@pytest.mark.parametrize("target", TARGETS)
def test_the_smallest_budget_named_is_the_smallest_that_works(target):
    with pytest.raises(PlanError, match="least it can take") as refused:
        choose_plan(SMALL, target, 1000)
    text, least = str(refused.value), refused.value.smallest
    assert choose_plan(SMALL, target, least).total <= least
    named = float(text.split("--budget ")[1].split()[0])
    assert "1 sink, 1 mid and 1 recent blocks" in text
    assert choose_plan(SMALL, target, int(named * GIB)).total <= named * GIB
    with pytest.raises(PlanError):
        choose_plan(SMALL, target, int((named - 0.01) * GIB))


def test_time_is_given_up_before_precision_and_precision_before_history():
    """Just below what a plan takes, the next in the documented order is chosen."""
    order, budget = [], 1 << 50
    while not order or order[-1][0] == WAN.policy.mid:
        plan = choose_plan(WAN, "sm86", budget)
        precision = plan.config.precision
        step = plan.config.policy.mid, precision.weights, precision.cache, plan.streamed > 0
        if step not in order:
            order.append(step)
        budget = plan.total - (4 << 20)
    formats = [("fp16", "fp16"), ("fp16", "int8"), ("int8", "int8"), ("int4", "int8")]
    full = [(16, *level, streams) for level in formats for streams in (False, True)]
    assert order == [*full, (15, "int4", "int8", True)]


def test_the_smallest_budget_for_the_full_history():
    whole, least = smallest(WAN, "sm86")
    assert whole.config.policy == least.config.policy == WAN.policy
    assert choose_plan(WAN, "sm86", least.total).config == least.config
    assert whole.config.vae_strips == 1 and least.total < whole.total


@pytest.mark.parametrize("target", ["sm86", "sm89", "sm120"])
def test_four_gib_hold_the_full_history(target):
    plan = choose_plan(WAN, target, 4 * GIB)
    assert plan.config.policy == WAN.policy and not plan.streamed


def test_only_dtypes_of_the_target_are_chosen():
    for target, formats in TARGETS.items():
        for precision in precisions(WAN, target):
            assert {precision.weights, precision.cache} <= {"fp16", *formats}
    assert [precision.cache for precision in precisions(WAN, "sm75")] == ["fp16"]
    for target in JETSON_TARGETS:  # TensorRT may write int8 that is only stored out in fp16
        assert {precision.weights for precision in precisions(WAN, target)} == {"fp16", "int4"}


@pytest.mark.parametrize(
    ("target", "formats", "message"),
    [
        ("sm75", {"cache": "int8"}, "sm75 has no int8 for the cache; it has fp32, fp16"),
        ("sm86", {"weights": "fp8"}, "sm86 has no fp8 for the weights; it has fp32, fp16, int8"),
        ("sm80", {"cache": "fp8"}, "sm80 has no fp8"),
        ("sm90", {}, "unknown target 'sm90'; known targets: sm75, sm80"),
    ],
)
def test_a_dtype_that_the_target_lacks_is_refused(target, formats, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(with_(WAN, **formats), target)


def test_fp8_needs_as_much_as_int8_without_the_second_scale_of_widening_matrices():
    fp8, int8 = (make_plan(with_(WAN, weights=k, cache=k), "sm89").total for k in ("fp8", "int8"))
    assert int8 - fp8 == (WAN.layers - 2) * WAN.ffn_dim * 2  # bytes


def test_predicted_times_are_the_roofline():
    """Everything at full size is bound by arithmetic; five calls of the denoiser dominate."""
    gpu = find_gpu("RTX 3060")
    work, calls = operations(WAN), calls_per_block(WAN)
    total = sum(work[call] * times for call, times in calls.items())
    assert seconds_per_block(WAN, gpu) == pytest.approx(total / (gpu.tflops["fp16"] * 1e12))
    assert calls["denoiser.block"] == 5
    shorter = StepOverrides(commit="last-step").apply(WAN)
    saved = seconds_per_block(WAN, gpu) - seconds_per_block(shorter, gpu)
    assert saved == pytest.approx(work["denoiser.block"] / (gpu.tflops["fp16"] * 1e12))
    starved = gpu._replace(bandwidth=1e-3)
    moved, weights = tensor_bytes(WAN), weight_bytes(WAN)
    slow = sum(
        (sum(moved[call].values()) + weights[call.split(".")[0]]) * times
        for call, times in calls.items()
    )
    assert seconds_per_block(WAN, starved) == pytest.approx(slow / 1e6)


def test_the_last_step_can_commit():
    policy = msgspec.structs.replace(WAN.policy, commit="last-step")
    assert calls_per_block(with_(WAN, policy=policy))["denoiser.block"] == 4


@pytest.mark.parametrize(
    ("weights", "products"),
    [("int8", "fp16"), ("int4", "fp16"), ("w8a8", "int8"), ("fp8", "fp8"), ("nvfp4", "nvfp4")],
)
@pytest.mark.parametrize("attention", [None, "fp8"])
def test_each_product_counts_at_the_rate_of_its_dtype(weights, products, attention):
    """A call is two operations per weight and token, and four per query, key and channel, of
    self-attention; the inner layers' matrices alone are quantized."""
    config = with_(WAN, weights=weights)
    precision = msgspec.structs.replace(config.precision, attention=attention)
    config = msgspec.structs.replace(config, precision=precision)
    gpu = find_gpu("RTX 5090")._replace(bandwidth=1e9)  # arithmetic alone
    rates = {dtype: 1e12 * rate for dtype, rate in gpu.tflops.items()}
    with torch.device("meta"):
        layer = Transformer(WAN).blocks[1]
    matrices = sum(t.numel() for n, t in layer.named_parameters()
                   if t.ndim == 2 and not is_prompt_weight(f"blocks.1.{n}"))  # fmt: skip
    expected, total, calls = 0.0, operations(WAN), calls_per_block(WAN)
    for call, tokens in (
        ("denoiser.block", WAN.block_tokens), ("denoiser.compressed", WAN.compressed_tokens),
    ):  # fmt: skip
        quantized = 2 * tokens * matrices * (WAN.layers - 2)
        attended = 4 * tokens * (tokens + WAN.context_tokens) * WAN.dim * WAN.layers
        rest = total[call] - quantized - attended
        if attention:  # queries and keys, new and of the context, times a matrix per head
            rest += 2 * (2 * tokens + WAN.context_tokens) * WAN.head_dim * WAN.dim * WAN.layers
        seconds = (
            quantized / rates[products] + attended / rates[attention or "fp16"]
            + rest / rates["fp16"]
        )  # fmt: skip
        expected += calls[call] * seconds
    for call in ("compressor", "vae_decoder"):
        expected += calls[call] * total[call] / rates["fp16"]
    assert seconds_per_block(config, gpu) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "weights", "attention", "least_fps"),
    [
        ("RTX 4090", "fp8", "fp8", 19),
        ("RTX 5090", "nvfp4", "fp8", 30),
        ("RTX 3060", "w8a8", None, 2.1),
    ],
)
def test_bounds_at_the_papers_history(name, weights, attention, least_fps):
    """At 832x480 and 100% of the dense rate with fp32 accumulation."""
    precision = Precision(compute="fp16", weights=weights, cache="fp16", attention=attention)
    config = msgspec.structs.replace(WAN, precision=precision)
    assert WAN.block_pixel_frames / seconds_per_block(config, find_gpu(name)) >= least_fps


def test_estimates_are_close_to_what_the_builder_says(tmp_path):
    config = with_(WAN, layers=2, dim=512, heads=4, ffn_dim=2048, height=256, width=256)
    expected = estimates(config)
    for graph in GPU_GRAPHS:
        (figures,) = builder_figures(config, tmp_path, graph)
        assert all(
            is_close_estimate(f"small.{name}", expected[name], built, RESERVE)
            for name, built in figures.items()
        )


@pytest.mark.parametrize("layers", [2, pytest.param(30, marks=pytest.mark.full)])
def test_the_plan_of_a_dgx_spark_has_the_figures_of_its_engines(tmp_path, layers):
    """Built for sm121, the plan of one memory has the builder's bytes, and all else as before."""
    config = with_(WAN, layers=30)
    if layers == 2:
        config = with_(WAN, layers=2, dim=512, heads=4, ffn_dim=2048, height=256, width=256)
    (figures,) = builder_figures(config, tmp_path, "denoiser", targets=("sm121",))
    expected = estimates(config)
    assert all(
        is_close_estimate(f"sm121.{name}", expected[name], built, RESERVE)
        for name, built in figures.items()
    )
    estimated, plan = make_plan(config, "sm121"), make_plan(config, "sm121", built=figures)
    engines = {**expected, **figures}
    scratch = max(size for name, size in engines.items() if name.startswith("scratch."))
    assert plan.shared and plan.device["scratch"] == scratch
    assert plan.device["weights.denoiser"] == figures["weights.denoiser"]
    changed = ("scratch", "weights.denoiser")
    difference = sum(plan.device[name] - estimated.device[name] for name in changed)
    assert plan.total - estimated.total == difference


@pytest.mark.full
@pytest.mark.parametrize("layers", [2, 6, 30])
def test_estimates_against_the_builder_at_full_size(tmp_path, layers):
    """Blocks of 3 and 4, three sizes. The denoiser's graph is the same for all of them."""
    configs = [
        with_(WAN, layers=layers, block_frames=frames, width=width, height=height)
        for frames in (3, 4)
        for width, height in ((832, 480), (640, 368), (480, 272))
    ]
    close = []
    first, *others = configs
    denoisers = builder_figures(first, tmp_path, "denoiser", *others)
    for config, figures in zip(configs, denoisers):
        expected = estimates(config)
        for graph in ("compressor", "vae_decoder"):
            figures |= builder_figures(config, tmp_path, graph)[0]
        size = f"{layers}x{config.block_frames}.{config.width}x{config.height}"
        close += [
            is_close_estimate(f"{size}.{name}", expected[name], built, RESERVE)
            for name, built in figures.items()
        ]
    assert all(close)

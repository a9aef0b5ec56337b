"""The planner for frames per second: against brute force, and that more never gives less."""

from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing.config import Precision
from packforcing.errors import ConfigError, PlanError
from packforcing.presets import MODELS, PLANNED_COMMITS, policies
from packforcing.runtime import realtime
from packforcing.runtime.estimate import seconds_per_block
from packforcing.runtime.gpus import PER_SM, GpuFigures, find_gpu
from packforcing.runtime.plan import CUDA_CONTEXT, TARGETS, make_plan
from packforcing.runtime.realtime import AXES, candidates, first_candidate, trade_offs
from packforcing.units import GIB
from tests.helpers import WAN

CANDIDATES = candidates(WAN, unmeasured=True)
LARGEST = "sm120"  # has every dtype that any target has


def budget_of(gpu):
    return gpu.memory_bytes - CUDA_CONTEXT


def test_a_candidate_needs_what_its_plan_and_its_prediction_say():
    """Bytes and calls are put together from parts; the whole config gives the same."""
    gpu = find_gpu("RTX 5090")
    runnable = [one for one in CANDIDATES if one.runs_on(gpu)]
    last_step = msgspec.structs.replace(
        WAN, policy=msgspec.structs.replace(WAN.policy, commit="last-step")
    )
    window = msgspec.structs.replace(
        MODELS["self-forcing"], policy=policies(MODELS["self-forcing"])["sliding-window"]
    )
    others = [one for config in (last_step, window) for one in candidates(config)[::41]]
    for one in (*runnable[::97], *others):
        assert one.total == make_plan(one.config, LARGEST).total
        fps = one.config.block_pixel_frames / seconds_per_block(one.config, gpu)
        assert one.fps(gpu) == pytest.approx(fps)


def grid():
    """Yield every combination on a small grid, with what it gives up in the documented order."""
    one_step = MODELS["causal-forcing-frame-1step"]
    models = [WAN, MODELS["causvid"], MODELS["causal-forcing-frame-2step"], one_step]
    sizes = [(832, 480), (640, 368), (480, 272), (416, 240)]
    weights = ["fp16", *(name for name in realtime.WEIGHTS if name in TARGETS[LARGEST])]
    levels = [("fp16", "fp16", None)]
    levels += [(name, "int8", dtype) for name, dtype in product(weights, realtime.ATTENTION)]
    for steps, model in enumerate(models):
        policy = WAN.policy if model is WAN else policies(model)["packforcing"]
        for (size, (width, height)), level in product(enumerate(sizes), range(len(levels))):
            weight, cache, attention = levels[level]
            precision = Precision(compute="fp16", weights=weight, cache=cache, attention=attention)
            yield (
                (model is one_step, size, steps, level),
                msgspec.structs.replace(
                    model, policy=policy, width=width, height=height, precision=precision
                ),
            )


def test_the_choice_is_that_of_brute_force():
    options = candidates(WAN, {"size", "steps", "precision"}, unmeasured=True)
    combinations = list(grid())
    totals = [make_plan(config, LARGEST).total for _, config in combinations]
    gpus = [find_gpu(name) for name in ("RTX 3060", "RTX 4060", "4070 laptop 115W", "RTX 4090")]
    for gpu in gpus:
        has = {"fp16", None, *TARGETS[gpu.target]}
        speeds = [
            (loss, config, config.block_pixel_frames / seconds_per_block(config, gpu))
            for (loss, config), total in zip(combinations, totals, strict=True)
            if {config.precision.weights, config.precision.cache, config.precision.attention} <= has
            and total <= budget_of(gpu)
        ]
        for goal in (2, 5, 8, 16, 24, 60):
            reaching = [(loss, config) for loss, config, fps in speeds if 0.5 * fps >= goal]
            best = min(reaching, key=lambda entry: entry[0])[1] if reaching else None
            chosen = first_candidate(options, gpu, goal, budget_of(gpu), 0.5)
            assert (chosen and chosen.config) == best, (gpu.name, goal)


rates = st.fixed_dictionaries({dtype: st.floats(5, 2000) for dtype in PER_SM})


@settings(deadline=None, max_examples=40)
@given(
    targets=st.sampled_from(
        [(a, b) for a, b in product(TARGETS, TARGETS) if {*TARGETS[a]} <= {*TARGETS[b]}]
    ),
    memory=st.floats(2, 16),
    bandwidth=st.floats(50, 2000),
    tflops=rates,
    lacks=st.sets(st.sampled_from(["int8", "fp8", "nvfp4"])),
    factors=st.lists(st.floats(1, 3), min_size=2 + len(PER_SM), max_size=2 + len(PER_SM)),
    goal=st.floats(1, 60),
    share=st.floats(0.2, 1),
)
def test_more_of_anything_never_gives_a_worse_picture(
    targets, memory, bandwidth, tflops, lacks, factors, goal, share
):
    """Of memory, bandwidth, rates and dtypes, and with a lower goal."""
    has = {dtype: rate for dtype, rate in tflops.items() if dtype not in lacks}
    more = {dtype: rate * factor for (dtype, rate), factor in zip(tflops.items(), factors[2:])}
    pairs = (
        (GpuFigures("less", targets[0], memory, bandwidth, has), goal),
        (
            GpuFigures("more", targets[1], memory * factors[0], bandwidth * factors[1], more),
            goal * share,
        ),
    )
    chosen = [first_candidate(CANDIDATES, gpu, fps, budget_of(gpu)) for gpu, fps in pairs]
    less, better = [CANDIDATES.index(one) if one else len(CANDIDATES) for one in chosen]
    assert better <= less


def test_steps_are_those_that_published_weights_were_trained_for():
    assert {one.config.name for one in CANDIDATES} == {
        "wan-1.3b", "causvid", "causal-forcing-frame-2step", "causal-forcing-frame-1step",
    }  # fmt: skip
    for one in CANDIDATES:
        model = MODELS[one.config.name]
        assert one.config.timesteps == model.timesteps and one.config.shift == model.shift


def test_the_commit_is_kept_unless_a_measurement_allows_it(monkeypatch):
    assert {one.config.policy.commit for one in CANDIDATES} == {*PLANNED_COMMITS}
    monkeypatch.setattr(realtime, "PLANNED_COMMITS", ("clean", "last-step"))
    options = candidates(WAN, {"commit"})
    assert [one.config.policy.commit for one in options] == ["clean", "last-step"]
    gpu = find_gpu("RTX 4090")
    assert options[1].fps(gpu) / options[0].fps(gpu) == pytest.approx(5 / 4, rel=0.05)


def test_only_measured_dtypes_are_chosen_unless_all_are_allowed():
    """Beside an int8 cache, which is measured, those that the lists name."""

    def dtypes(options):
        return {
            (p.weights, p.cache, p.attention) for p in (one.config.precision for one in options)
        }

    measured = dtypes(candidates(WAN))
    assert measured == {("fp16", "fp16", None)} | {
        (weights, "int8", attention)
        for weights in ("fp16", *realtime.MEASURED_WEIGHTS)
        for attention in realtime.MEASURED_ATTENTION
    }
    assert measured < dtypes(CANDIDATES)
    assert {weights for weights, _, _ in dtypes(CANDIDATES)} == {"fp16", *realtime.WEIGHTS}
    gpu = find_gpu("RTX 4090")
    best = first_candidate(CANDIDATES, gpu, 16, budget_of(gpu))
    assert best.fps(gpu) >= 16 and best.config.precision.attention == "fp8"


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_left_out_is_what_the_gpu_has_and_the_candidates_lack(target):
    gpu = find_gpu("RTX 5090")._replace(target=target)
    measured = {one.config.precision for one in candidates(WAN, {"precision"})}
    lacking = [
        one.config.precision
        for one in candidates(WAN, {"precision"}, unmeasured=True)
        if one.config.precision not in measured and one.runs_on(gpu)
    ]
    named = {f"{one.weights} weights" for one in lacking} | {
        f"{one.attention} attention" for one in lacking if one.attention
    }
    named -= {f"{name} weights" for name in ("fp16", *realtime.MEASURED_WEIGHTS)}
    assert {*realtime.left_out(target)} == named


def test_what_is_fixed_is_kept():
    options = candidates(WAN, {"precision"})
    assert {(one.config.width, one.config.policy) for one in options} == {(832, WAN.policy)}
    assert [one.losses[-1] for one in options] == list(range(len(options)))
    assert len(candidates(WAN, ())) == 1


@pytest.mark.parametrize("name", ["RTX 3060", "RTX 4060", "RTX 4090", "RTX 5060 Ti"])
def test_trade_offs_keep_one_thing_whole_each(name):
    gpu = find_gpu(name)
    chosen, *others = trade_offs(CANDIDATES, gpu, 16, budget_of(gpu))
    assert chosen == first_candidate(CANDIDATES, gpu, 16, budget_of(gpu))
    for one in (chosen, *others):
        assert one.total <= budget_of(gpu) and one.fps(gpu, realtime.EFFICIENCY) >= 16
    for one in others:
        assert any(own == 0 < loss for own, loss in zip(one.losses, chosen.losses))


def test_a_goal_that_nothing_reaches_names_the_fastest():
    gpu = find_gpu("RTX 4060")
    with pytest.raises(PlanError, match=r"reach 500 fps on RTX 4060: the fastest is") as refused:
        trade_offs(CANDIDATES, gpu, 500, budget_of(gpu))
    reachable = float(str(refused.value).split("give --fps ")[1].split(",")[0])
    assert trade_offs(CANDIDATES, gpu, reachable, budget_of(gpu))


def test_a_memory_that_nothing_fits_names_the_smallest():
    gpu = find_gpu("RTX 4060")
    with pytest.raises(PlanError, match=r"nothing fits into 0\.50 GiB on RTX") as refused:
        trade_offs(CANDIDATES, gpu, 16, GIB // 2)
    assert trade_offs(CANDIDATES, gpu, 0.01, refused.value.smallest)


def test_a_gpu_without_the_dtypes_is_refused():
    gpu = find_gpu("RTX 4060")._replace(tflops={"fp8": 60.0})
    with pytest.raises(ConfigError, match="RTX 4060 lacks a dtype of these"):
        trade_offs(CANDIDATES, gpu, 16, budget_of(gpu))


def test_every_axis_is_given_up_somewhere():
    given_up = [any(one.losses[axis] for one in CANDIDATES) for axis in range(len(AXES))]
    assert dict(zip(AXES, given_up)) == {
        axis: axis != "commit" or "last-step" in PLANNED_COMMITS for axis in AXES
    }

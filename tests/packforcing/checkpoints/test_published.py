"""What each published model reads of its past, in which steps it denoises, and what differs."""

import json
import re

import msgspec
import numpy as np
import pytest

from packforcing import MODELS, Policy, model_config
from packforcing.checkpoints.published import PUBLISHED, UNSUPPORTED, describe_differences
from packforcing.presets import policies, switch_history
from packforcing.runtime.cache import Cache
from packforcing.sampler import denoising_steps
from tests.helpers import run
from tests.packforcing.checkpoints.layouts import infinity_rope, run_command

# The settings files of the published code: `denoising_step_list` without a final 0,
# `warp_denoising_step`, `timestep_shift` under `model_kwargs` (CausVid: at the top), and
# `num_frame_per_block`. self_forcing_sid.yaml has the numbers of self_forcing_dmd.yaml.
FOUR_STEPS = [1000, 750, 500, 250]
PRESETS = dict(MODELS)  # before the fixtures of this folder put narrow models in their place
SETTINGS = {
    "self-forcing": (FOUR_STEPS, True, 5, 3),  # Self-Forcing, configs/self_forcing_dmd.yaml
    "self-forcing-sid": (FOUR_STEPS, True, 5, 3),  # configs/self_forcing_sid.yaml
    "causvid": ([1000, 757, 522], False, 8, 3),  # CausVid, configs/wan_causal_dmd.yaml
    "causvid-4step": (FOUR_STEPS, True, 8, 3),  # configs/wan_causal_dmd_warp_4step_cfg2.yaml
    "causal-forcing": (FOUR_STEPS, True, 5, 3),  # configs/causal_forcing_dmd_chunkwise.yaml
    "causal-forcing-frame": (FOUR_STEPS, True, 5, 1),  # ..._framewise.yaml
    "causal-forcing-frame-2step": ([1000, 500], True, 5, 1),  # ..._framewise_2step.yaml
    "causal-forcing-frame-1step": ([1000], True, 5, 1),  # ..._framewise_1step.yaml
    "longlive": (FOUR_STEPS, True, 5, 3),  # LongLive v1.0, configs/longlive_inference.yaml
    "infinity-rope": (FOUR_STEPS, True, 5, 3),  # Infinity-RoPE, configs/self_forcing_dmd.yaml
}


def read(kind: str, block: int) -> tuple[list[int], list[float], float]:
    """The frames a block has in context, where they are put, and where its own first frame is."""
    cache = Cache(model_config(kind))
    for _ in range(block):
        cache.commit()
    layout, size = cache.layout(), cache.config.block_frames
    slots = sorted(layout.slots)
    frames = [slot.block * size + frame for slot in slots for frame in range(size)]
    places = [slot.start + frame for slot in slots for frame in range(size)]
    return frames, places, layout.start


def test_published_windows():
    """Self-Forcing rolls 21 frames with the current 3; LongLive keeps 12, the first 3 for ever;
    a frame-wise model 21 with the current one. All at their true positions."""
    frames, places, start = read("self-forcing", 10)  # frames 30, 31, 32
    assert frames == places == list(range(12, 30)) and start == 30
    frames, places, start = read("self-forcing", 6)  # nothing has left: CausVid's whole clip
    assert frames == places == list(range(18)) and start == 18
    frames, places, start = read("longlive", 10)
    assert frames == places == [0, 1, 2, 24, 25, 26, 27, 28, 29] and start == 30
    frames, places, start = read("causal-forcing-frame", 50)
    assert frames == places == list(range(30, 50)) and start == 50


def test_infinity_rope_counts_positions_within_its_window():
    """A block of sink and one of window, where it publishes 1 and 2 frames; then the new block."""
    frames, places, start = read("infinity-rope", 10)
    assert frames == [0, 1, 2, 27, 28, 29] and places == [0, 1, 2, 3, 4, 5] and start == 6


@pytest.mark.parametrize("kind", [kind for kind, row in PUBLISHED.items() if not row.refused])
def test_every_model_runs_under_the_other_policies(kind):
    """StreamingLLM's keeps first and last, at positions within the cache; the engines of a bundle
    are made for a policy, so exporting and planning take its name as well."""
    policy = policies(model_config(kind))["sink-window"]
    assert policy.sink and not policy.mid and policy.recent and policy.positions == "packed"
    planned = run_command("plan", "--model", kind, "--policy", "packforcing", "--size", "832x480")
    assert re.search(r" [1-9] sink, 16 mid and [1-9] recent blocks", planned)


@pytest.mark.parametrize("kind", SETTINGS)
def test_models_are_denoised_as_their_settings_say(kind):
    """By the published scheduler: `timesteps[1000 - listed]` of a table of 1000, warped or not."""
    listed, warp, shift, block_frames = SETTINGS[kind]
    s = 1 - np.arange(1000) / 1000
    table = np.append(1000 * shift * s / (1 + (shift - 1) * s), 0)
    config = model_config(kind)
    timesteps, levels, _ = zip(*denoising_steps(config, 1))
    expected = [table[1000 - step] for step in listed] if warp else listed
    np.testing.assert_allclose(timesteps, expected, rtol=1e-12)
    nearest = [min(table[:-1], key=lambda t, step=step: abs(t - step)) / 1000 for step in expected]
    np.testing.assert_allclose(levels, nearest, rtol=1e-12)
    assert config.block_frames == block_frames
    first = [timestep for timestep, *_ in denoising_steps(config, 0)]
    if kind in ("causal-forcing-frame-2step", "causal-forcing-frame-1step"):
        expected = [table[1000 - step] for step in FOUR_STEPS]  # denoising_step_list_first_chunk
    np.testing.assert_allclose(first, expected, rtol=1e-12)


def test_every_model_of_the_family_has_a_preset_or_a_reason():
    for kind, row in PUBLISHED.items():
        assert (kind in PRESETS) != bool(row.refused), kind
    assert "noise levels" in PUBLISHED["causal-forcing-long"].refused
    for kind in ("self-forcing-sid-v2", "self-forcing-gan", "self-forcing-10s"):
        assert "settings are not published" in PUBLISHED[kind].note


def test_only_longlive_recomputes_at_a_switch_by_itself():
    histories = {name: switch_history(config) for name, config in PRESETS.items()}
    assert {name for name, history in histories.items() if history != "keep"} == {"longlive"}
    assert histories["longlive"] == "recompute"


def test_longlives_infinite_mode_is_a_policy():
    """Its sink of 3 frames and window of 9 with the current 3, at positions within the window."""
    policy = policies(model_config("longlive"))["sink-window"]
    assert policy == Policy(sink=1, mid=0, recent=2, positions="packed")


def test_what_differs_from_what_is_published_is_listed():
    assert describe_differences(model_config("causvid-4step")) == []
    assert describe_differences(model_config("demo")) == []
    [line] = describe_differences(model_config("infinity-rope"))
    assert "sink of one latent frame" in line and "9 frames are read where 6 are" in line
    config = model_config("longlive")
    changed = msgspec.structs.replace(
        config, policy=policies(config)["packforcing"], timesteps=(1000, 500), shift=8
    )
    denoising, history = describe_differences(changed)
    assert denoising == (
        "denoising: renoise at 1000 500, shift 8; published with renoise at 1000 750 500 250, "
        "shift 5"
    )
    assert history.startswith("history: 3 sink, 16 mid and 2 recent blocks")
    assert history.endswith("published with 1 sink, 0 mid and 2 recent blocks, absolute positions")


def test_import_says_what_differs(weights, tmp_path):
    """Where a page alone would say it, nobody reads it."""
    [path] = infinity_rope(tmp_path, weights)
    ask = "import-checkpoint", path, "--model", "infinity-rope", "--out"
    line = "a history has whole blocks: the published sink of one latent frame"
    assert f"not as published: {line}" in run_command(*ask, tmp_path / "one")
    [difference] = json.loads(run_command(*ask, tmp_path / "two", "--json"))["differences"]
    assert difference.startswith(line)


def test_the_list_of_models_says_how_they_run():
    output = run_command("models")
    for line in (
        "causvid-4step\n  blocks of 3, renoise at 1000 750 500 250, shift 8; ",
        "(the first block generated at 1000 750 500 250)",
        "absolute positions; a prompt switch: recompute",
        "causal-forcing-long\n  weights only: it is rolled out like rolling-forcing",
        "not as published: a history has whole blocks",
    ):
        assert line in output, line
    table = json.loads(run_command("models", "--json"))
    assert table["longlive"]["switch_history"] == "recompute"
    assert table["self-forcing-gan"]["note"].startswith("its settings are not published")


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_files_beside_the_models_are_refused_by_name(kind, tmp_path):
    reason = f"error: {kind} is not supported: {UNSUPPORTED[kind]}\n"
    path = tmp_path / "model.pt"
    for args in (("fetch", kind), ("import-checkpoint", path, "--model", kind, "--out", "out")):
        result = run(*args)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", reason)
    assert f"{kind}\n  not supported: " in run_command("models")
    advice = UNSUPPORTED[kind].rpartition("use ")[2]
    assert kind not in PUBLISHED and not PUBLISHED[advice].refused

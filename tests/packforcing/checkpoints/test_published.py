"""What each published model reads of its past."""

import re

import pytest

from packforcing import model_config
from packforcing.checkpoints.published import (
    PUBLISHED,
)
from packforcing.presets import policies
from packforcing.runtime.cache import Cache
from tests.packforcing.checkpoints.layouts import (
    run_command,
)


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

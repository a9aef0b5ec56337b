"""A render goes on after whatever ended it, and gives the frames it would have given.

The truth is the stream of a session that nothing happened to: lossless outputs are compared with
it, H.264 with the file of an uninterrupted render.
"""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from packforcing import Policy
from packforcing.errors import RenderStopped
from packforcing.prompts import Switch
from packforcing.runtime import Session
from tests.emulated import Cuda, on_gpu

PROMPT, SEED = "a red star over navy stripes", 5
SECONDS, EVERY = 15, 3.0  # a block lasts 1.5 s: 11 blocks, two between checkpoints
TARGETS = ("a.mkv", "a.mp4", "frames/")


@pytest.fixture(scope="module", params=["host", "gpu"])
def session(request, tiny_bundle):
    with Session.open(tiny_bundle) as session:
        if request.param == "gpu":
            session._backend = on_gpu(session._backend, Cuda())
        yield session


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    with Session.open(tiny_bundle) as session:
        yield session


@pytest.fixture(scope="module")
def truth(tiny_bundle) -> np.ndarray:
    with Session.open(tiny_bundle) as session:
        return np.concatenate(list(session.stream(PROMPT, SECONDS, SEED)))


def render(session, path, **changes):
    asked = {"prompt": PROMPT, "seconds": SECONDS, "seed": SEED, "checkpoint_seconds": EVERY}
    return session.render(path=path, **{**asked, **changes})


def stop_after(session, *blocks):
    """An `on_block` that stops the session after each of these."""
    return lambda info: session.stop() if info.index + 1 in blocks else None


def frames_of(path: Path) -> np.ndarray:
    if path.is_dir():
        return np.stack([cv2.imread(str(file))[..., ::-1] for file in sorted(path.iterdir())])
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    ("target", "stops"),
    [("a.mkv", (1,)), ("a.mkv", (3, 4, 10)), ("a.mp4", (2, 7)), ("frames/", (5,))],
)
def test_a_resumed_render_equals_an_uninterrupted_one(session, truth, tmp_path, target, stops):
    path = tmp_path / target
    for _ in stops:
        with pytest.raises(RenderStopped, match=r"after \d+ of 11 blocks; .*\.render: resume it"):
            render(
                session, f"{tmp_path}/{target}", resume=True, on_block=stop_after(session, *stops)
            )
        assert not path.exists()
        stops = stops[1:]
    render(session, f"{tmp_path}/{target}", resume=True)
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
    if target == "a.mp4":
        render(session, tmp_path / "b.mp4")
        assert path.read_bytes() == (tmp_path / "b.mp4").read_bytes()
        assert len(frames_of(path)) == len(truth)
    else:
        np.testing.assert_array_equal(frames_of(path), truth)


SCENES = [
    Switch(0, PROMPT),
    Switch(4, "a blue square over sand checks", "recompute"),
    Switch(8, "a white circle", "cut"),
    Switch(12, "a green circle", "keep"),
]
POLICIES = {
    "packforcing": None,
    "no recent": Policy(sink=1, mid=4, recent=0, selection="random"),
    "absolute": Policy(sink=2, mid=2, recent=1, positions="absolute", selection="recency"),
    "sliding window": Policy(sink=0, mid=0, recent=3),
    "full history": Policy(sink=0, mid=0, recent=1000),
    "late sink": Policy(sink=5, mid=2, recent=2),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_policy_and_prompt_schedule_resumes(tiny_bundle, tmp_path, policy):
    """Stopped after every block in turn."""
    with Session.open(tiny_bundle, policy=policy) as session:
        truth = np.concatenate(list(session.stream(SCENES, SECONDS, SEED)))
        summary = None
        for block in range(1, 30):
            stop = stop_after(session, block)
            try:
                summary = render(
                    session, tmp_path / "a.mkv", prompt=SCENES, resume=True, on_block=stop
                )
            except RenderStopped:
                continue
            break
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)
    assert block == summary.blocks == 11
    assert [info.block for info in summary.prompts] == [0, 3, 6, 9]

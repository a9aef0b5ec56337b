"""A user's program under `mypy --strict`: what is right passes, what is misspelled does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = "runtime", "export", "calibration", "evaluation", "app"

RIGHT = """
import asyncio
from pathlib import Path

import numpy as np
import numpy.typing as npt

from packforcing import PackForcingError, Policy
from packforcing.embeddings import Embedding, load_embedding
from packforcing.presets import policies
from packforcing.prompts import Switch, read_schedule, write_schedule
from packforcing.runtime import (
    Block, BlockInfo, RenderSummary, Session, StepInfo, Video, demo_bundle,
)


def show(step: StepInfo) -> None:
    print(step.block, step.step, step.steps)


def steer(session: Session, policy: Policy | None = None) -> Video:
    with session.begin("a red star", seed=7, lead=1.5, policy=policy, on_step=show) as video:
        for block in video:
            index: int = block.info.index
            if index == 3:
                first: int = video.switch("a blue circle", history="recompute", over=4)
                video.switch(np.zeros((4, 8), np.float32), "cut")
            if index > 8:
                video.stop()
    return video


def bytes_of(block: Block) -> npt.NDArray[np.uint8]:
    assert isinstance(block.frames, np.ndarray)
    return block.frames


async def watch(session: Session) -> int:
    frames = 0
    async for block in session.begin("a red star", frames="float32", archive_limit="512 MiB"):
        frames += len(bytes_of(block))
    return frames


def render(session: Session, schedule: list[Switch], target: Path) -> RenderSummary:
    blocks: list[BlockInfo] = []
    return session.render(
        schedule, 6, target, 7, resume=True, on_block=blocks.append, archive_limit=64
    )


def main() -> None:
    embedding: Embedding = load_embedding("prompt.safetensors")
    try:
        with Session.open(demo_bundle(), threads=2, backend="onnxruntime", device=0) as session:
            video = steer(session, policies(session.config)["packforcing"])
            write_schedule("live.toml", video.schedule)
            summary = render(session, read_schedule("live.toml"), Path("again.mp4"))
            seconds: float = summary.seconds_total
            print(asyncio.run(watch(session)), seconds)
        with Session.from_pretrained("user/repo", revision="main") as session:
            for frames in session.stream(embedding, 2.0, start=np.zeros((8, 8, 3), np.uint8)):
                print(frames.shape)
    except PackForcingError as error:
        print(error)


main()
"""

# a mistake in each line, and what mypy has to say of it
WRONG = {
    "from packforcing.runtime import Sesion": 'has no attribute "Sesion"',
    "from packforcing.runtime import Session": None,
    "session = Session.open('bundle', tread=2)": 'Unexpected keyword argument "tread"',
    "video = Session.from_pretrained('a/b').beginn('a red star')": 'has no attribute "beginn"',
    "with Session.open('bundle') as session: video = session.begin('a red star', 7)": None,
    "video.swich('a blue circle')": 'has no attribute "swich"',
    "video.switch('a blue circle', 'keap')": "has incompatible type \"Literal['keap']",
    "video.switch('a blue circle', over='4')": 'has incompatible type "str"',
    "session.begin('a red star', frames='uint9')": "has incompatible type \"Literal['uint9']",
    "for block in video: print(block.info.indx)": 'has no attribute "indx"',
    "print(video.shedule)": 'has no attribute "shedule"',
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What one run of mypy says of both programs, by file and line."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("typing")
    package = folder / "path" / "packforcing"
    package.mkdir(parents=True)  # the rooms come together as one package, as once installed
    for path in (*(ROOT / "packforcing").iterdir(), *(ROOT / room for room in ROOMS)):
        (package / path.name).symlink_to(path)
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text("\n".join(WRONG))
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=",
         f"--cache-dir={ROOT / '.mypy_cache'}", "right.py", "wrong.py"],
        cwd=folder, env={**os.environ, "MYPYPATH": "path"}, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 1, checked.stderr
    lines = re.findall(r"^(\w+)\.py:(\d+): error: (.*)", checked.stdout, re.MULTILINE)
    return [(name, int(line), message) for name, line, message in lines]


def test_a_program_that_is_right_passes(errors):
    assert [error for error in errors if error[0] == "right"] == []


def test_each_misspelled_name_is_an_error(errors):
    messages = {line: message for name, line, message in errors if name == "wrong"}
    expected = {line: part for line, part in enumerate(WRONG.values(), 1) if part}
    assert messages.keys() == expected.keys(), messages
    for line, part in expected.items():
        assert part in messages[line]

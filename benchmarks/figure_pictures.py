"""Draw the pictures of README.md and docs/ from a finished comparison of policies."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from packforcing.evaluation.compare import Comparison, Pair
from packforcing.evaluation.demo_judge import places, visits
from packforcing.evaluation.measures import ALL_MEASURES
from packforcing.evaluation.video_reader import read_frames

DEMO_FRAMES = 8  # of each video, first to last
TOUR_POLICIES = "packforcing", "sink-window", "sliding-window"
TOURS, VISITS, TOUR_WIDTH = 2, 12, 80  # tours, pictures of each, pixels of a picture
CURVES = (
    "background_consistency",
    next(name for name in ALL_MEASURES if "drift" in name),
    "loop_closure",
)


def drawn_by_the_command(folder: Path, target: Path) -> None:
    """Leave a picture as the run's command drew it."""


def draw_demo(folder: Path, target: Path) -> None:
    """Draw frames of three videos, a row each: two of one ground and a tour."""
    pairs = [pair for pair in _comparison(folder).pairs if pair.policy == "packforcing"]
    plain = [pair for pair in pairs if len(places(pair.prompt)) == 1]
    tours = [pair for pair in pairs if len(places(pair.prompt)) > 1]
    rows = []
    for pair in (*plain[:2], *tours[:1]):
        count = pair.evaluation.frames
        step = count // DEMO_FRAMES
        rows.append(_frames(folder, pair, [step // 2 + step * i for i in range(DEMO_FRAMES)]))
    _save(rows, target)


def draw_tours(folder: Path, target: Path) -> None:
    """Draw visits to the places of tours spread over the video, a row per tour and policy."""
    pairs = _comparison(folder).pairs
    numbers = sorted({pair.number for pair in pairs if len(places(pair.prompt)) > 1})
    rows = []
    for number in numbers[:TOURS]:
        for policy in TOUR_POLICIES:
            (pair,) = (pair for pair in pairs if (pair.number, pair.policy) == (number, policy))
            stays = list(visits(pair.prompt, read_frames(folder / pair.video)))
            chosen = np.linspace(0, len(stays) - 1, VISITS).round().astype(int)
            middles = [(stays[i].start + stays[i].stop) // 2 for i in chosen]
            rows.append(_frames(folder, pair, middles))
    _save(rows, target, TOUR_WIDTH)


def draw_curves(folder: Path, target: Path) -> None:
    """Draw three measures over the length of the video, a line per policy."""
    from matplotlib.figure import Figure

    result = _comparison(folder)
    figure = Figure(figsize=(11, 2.5), layout="constrained")
    names = {measure.title: name for name, measure in ALL_MEASURES.items()}
    for axis, title in zip(figure.subplots(1, len(CURVES)), CURVES):
        name = names[title]
        for policy in result.costs:
            segments = [p.evaluation.segments for p in result.pairs if p.policy == policy]
            times, means = [], []
            for column in zip(*segments):
                values = [value for part in column if (value := part.values[name]) is not None]
                if values:
                    times.append((column[0].start + column[0].stop) / 2)
                    means.append(float(np.mean(values)))
            axis.plot(times, means, lw=1.4, marker=".", ms=4, label=policy)
        axis.set_title(title, loc="left")
        axis.set_xlim(0, result.seconds)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper left", ncols=4,
                  frameon=False)  # fmt: skip
    figure.savefig(target, dpi=100, metadata={"Software": None})


def _comparison(folder: Path) -> Comparison:
    return msgspec.json.decode((folder / "compare.json").read_bytes(), type=Comparison)


def _frames(folder: Path, pair: Pair, numbers: list[int]) -> list[np.ndarray]:
    """Frames of a video by number; a number may come several times."""
    frames = {
        number: frame
        for number, frame in enumerate(read_frames(folder / pair.video))
        if number in numbers
    }
    return [frames[number] for number in numbers]


def _save(rows: list[list[np.ndarray]], target: Path, width: int | None = None) -> None:
    image = Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows]))
    if width is not None:
        scale = width / rows[0][0].shape[1]
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX
        )
    image.save(target, optimize=True)

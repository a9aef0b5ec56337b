"""Measure how well a video holds, ten seconds at a time. NumPy, OpenCV and PyAV; no network.

The measures carry the names of VBench's dimensions (https://arxiv.org/abs/2311.17982) where they
ask the same, but not its networks: histograms of colors and of oriented gradients stand in for
DINO and CLIP, DIS optical flow for RAFT and for the interpolator AMT. So their values compare
videos with each other, not with published scores. `MEASURES` defines each; docs/compare.md has the
long form.

What the demo model was prompted to show is read exactly, by the detectors of its own world
(`packforcing.evaluation.demo_judge`). With the prompt, they also outline the subject.
In any other video the subject is what moves against the camera.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from packforcing.errors import VideoError
from packforcing.evaluation import demo_judge
from packforcing.evaluation.recall import CHANCE, Visit, judge_recall
from packforcing.evaluation.video_reader import probe_video, read_frames
from packforcing.extras import optional_imports
from packforcing.presets import model_config
from packforcing.words import COLORS, GROUNDS, SHAPES, encode_words

with optional_imports("measuring videos", "evaluate"):
    import cv2

SEGMENT = 10.0  # seconds
REFERENCE = 1.0  # seconds at the start that the rest is compared with
DYNAMIC = 6 / 256  # short sides a second / 8: VBench's threshold, on frames 1/8 s apart
TOP = 0.05  # of the flow vectors, the longest: VBench's dynamic degree
MOVES = 0.25  # pixels a frame, against the camera, from which on something is a subject
BINS = 32  # of a histogram, for each of L, a, b
SIDE, CELL, DIRECTIONS = 128, 16, 8  # of oriented gradients: pixels of a frame, of a cell; bins
LAB = ((0.0, 100.0), (-110.0, 110.0), (-110.0, 110.0))  # what sRGB reaches, about


class Measure(NamedTuple):
    """What a measure is called and what it means.

    Attributes:
        title: Its name in a table of its own row.
        head: The head of a column.
        better: "higher", "lower", or "" where neither is.
        meaning: One line.
    """

    title: str
    head: str
    better: str
    meaning: str


# By the names that evaluations have in JSON, which keep their spelling.
MEASURES = dict(
    subject_consistency=Measure(
        "subject consistency", "subject", "higher", "likeness of the subject's colors to the first "
        "second's and to the frame before's, half and half; 0 to 1",
    ),
    background_consistency=Measure(
        "background consistency", "backgr.", "higher", "the same of all other pixels; 0 to 1"
    ),
    structure_consistency=Measure(
        "structure consistency", "struct.", "higher", "likeness of the frame's oriented gradients "
        "to the first second's and to the frame before's, half and half; 0 to 1",
    ),
    colour_drift=Measure(
        "color drift", "drift", "lower",
        "distance of the frame's mean color from the first second's, in CIELAB",
    ),
    motion=Measure(
        "motion", "motion", "",
        "the fastest 5% of the optical flow, in % of the short side per second",
    ),
    dynamic_degree=Measure(
        "dynamic degree", "dynamic", "", "share of frames whose motion is above 18.75%"
    ),
    smoothness=Measure(
        "smoothness", "smooth", "higher", "likeness of every second frame to what flow makes of "
        "the frames beside it; 0 to 1",
    ),
    flicker=Measure(
        "flicker", "flicker", "lower",
        "difference to the frame before moved along the flow, in levels of 255",
    ),
)  # fmt: skip
DEMO_MEASURES = dict(
    colour=Measure(
        "color", "color", "higher", "share of frames whose subject has the color of the prompt"
    ),
    shape=Measure(
        "shape", "shape", "higher", "share of frames whose subject has the shape of the prompt"
    ),
    colour_and_shape=Measure(
        "color and shape", "both", "higher", "share of frames where both are right"
    ),
    ground=Measure("ground", "ground", "higher", "share of frames over a ground of the prompt"),
    speed=Measure("speed", "speed", "", "of the subject, in % of the short side per second"),
    returns=Measure("returns", "returns", "", "times the camera came back to a place of a tour"),
    loop_closure=Measure(
        "loop closure", "loop", "lower",
        "share of a place's landmarks that differ from the first visit's; 0 to 1",
    ),
)  # fmt: skip
RECALL_MEASURES = dict(
    recall=Measure(
        "recall", "recall", "higher", "share of the frames of returns to places that show the "
        f"ground seen on the first visit, which the prompt does not tell; a guess has {CHANCE:.2f}",
    ),
    retrieved=Measure(
        "retrieved", "retrieved", "higher", "share of returns whose first block read a block of "
        "the first visit from the archive",
    ),
    revisits=Measure("returns to places", "revisits", "", "of which `retrieved` is a share"),
    scored=Measure(
        "returns that count", "scored", "", "those whose first visit showed the ground of its "
        "prompt; `recall` is a mean over them",
    ),
)  # fmt: skip
SUBJECT_MEASURES = tuple(DEMO_MEASURES)[:2]  # color and shape
ALL_MEASURES = {**MEASURES, **DEMO_MEASURES, **RECALL_MEASURES}
COUNTS = ("returns", "scored", "revisits")  # measures that are summed, not averaged
# by measure, the count that its mean over several segments is weighted by, instead of their length
WEIGHTS = {"loop_closure": "returns", "recall": "scored", "retrieved": "revisits"}
Values = dict[str, float | None]  # by measure; None where there was nothing to measure


class Segment(msgspec.Struct, frozen=True):
    """Mean values from `start` to `stop`, in seconds; `returns` is a count."""

    start: float
    stop: float
    values: Values


class Evaluation(msgspec.Struct, frozen=True):
    """The measures of a video; `values` are those of all of it."""

    video: str
    prompt: str | None
    fps: float
    frames: int
    width: int
    height: int
    values: Values
    segments: list[Segment]


def evaluate_video(
    video: str | os.PathLike[str],
    prompt: str | None = None,
    on_frame: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a video file in bounded memory, however long it is.

    Args:
        video: The file.
        prompt: What the demo model was prompted to show; adds `DEMO_MEASURES`.
        on_frame: Called with the number of frames read so far, and of all. A tour's are read
            twice.

    Raises:
        VideoError: The file cannot be measured.
        PromptError: The prompt is not the demo model's.
    """
    path = Path(video)
    fps, count, size = probe_video(path)
    tour = False
    if prompt is not None:
        config = model_config("demo")
        encode_words(prompt, config)
        if size != (config.width, config.height):
            raise VideoError(
                f"{path} is {size[0]}x{size[1]} and the demo model's videos are "
                f"{config.width}x{config.height}: a prompt can be checked in those alone"
            )
        tour = len(demo_judge.places(prompt)) > 1

    def frames(before: int) -> Iterator[np.ndarray]:
        for done, frame in enumerate(read_frames(path), before + 1):
            if on_frame:
                on_frame(done, max(done, count * (1 + tour)))
            yield frame

    tally = measure_frames(frames(0), fps, prompt)
    if tally.frames < 3:
        raise VideoError(f"{path} has {tally.frames} frames: three are needed to measure anything")
    if prompt is not None:
        for visit in demo_judge.returns(prompt, frames(tally.frames) if tour else ()):
            tally.add(visit.frame, {"loop_closure": visit.error, "returns": 1.0})
    return Evaluation(str(path), prompt, fps, tally.frames, *size, tally.total(), tally.segments())


def evaluate_recall(
    video: str | os.PathLike[str],
    world: Sequence[Visit],
    read: Sequence[Collection[int]],
    on_frame: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure the recall of a world's video, and whether color and shape stay right.

    Args:
        video: The file.
        world: The visits that it follows (`packforcing.evaluation.recall`).
        read: The archived blocks that each block read.
        on_frame: Called with the number of frames read so far, and of all.

    Raises:
        VideoError: The file cannot be measured.
    """
    path, config = Path(video), model_config("demo")
    fps, count, size = probe_video(path)
    tally = Tally(fps, [*SUBJECT_MEASURES, *RECALL_MEASURES])
    grounds, before = list[str](), None
    for index, pixels in enumerate(read_frames(path)):
        scene = demo_judge.read_scene(pixels)
        values = _demo_values(scene, before, world[0].prompt, fps)
        tally.add(index, {name: values[name] for name in SUBJECT_MEASURES})
        grounds.append(scene.ground)
        before = scene
        if on_frame:
            on_frame(index + 1, max(index + 1, count))
    for visit in judge_recall(config, world, grounds, read):
        counts: Values = {"revisits": 1, "scored": int(visit.scored)}
        recall = visit.share if visit.scored else None
        tally.add(visit.frame, {**counts, "retrieved": float(visit.retrieved), "recall": recall})
    prompt = world[0].prompt
    return Evaluation(str(path), prompt, fps, tally.frames, *size, tally.total(), tally.segments())


class Tally:
    """Sums of per-frame values by segment."""

    def __init__(self, fps: float, names: Iterable[str]) -> None:
        self.fps, self.frames, self._names = fps, 0, list(names)
        self._sums: list[dict[str, list[float]]] = []

    def add(self, frame: int, values: Values) -> None:
        """Add the values of frame number `frame`; None is left out."""
        index = int(frame / self.fps / SEGMENT)
        while len(self._sums) <= index:
            self._sums.append({})
        self.frames = max(self.frames, frame + 1)
        for name, value in values.items():
            if value is not None:
                pair = self._sums[index].setdefault(name, [0.0, 0.0])
                pair[0] += value
                pair[1] += 1

    def segments(self) -> list[Segment]:
        """Return the means of each segment."""
        length = self.frames / self.fps
        return [
            Segment(i * SEGMENT, min((i + 1) * SEGMENT, length), self._means([sums]))
            for i, sums in enumerate(self._sums)
        ]

    def total(self) -> Values:
        """Return the means over all frames."""
        return self._means(self._sums)

    def _means(self, segments: list[dict[str, list[float]]]) -> Values:
        means: Values = {}
        for name in self._names:
            pairs = [sums[name] for sums in segments if name in sums]
            total, count = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
            means[name] = total if name in COUNTS else total / count if count else None
        return means


def measure_frames(frames: Iterable[np.ndarray], fps: float, prompt: str | None = None) -> Tally:
    """Measure frames as they come, two of which are in memory at a time.

    All but `returns` and `loop_closure`, which take another pass over a tour's frames.

    Args:
        frames: Frames, uint8 RGB [H, W, 3].
        fps: Frames per second.
        prompt: What the demo model was prompted to show.
    """
    tally = Tally(fps, MEASURES if prompt is None else {**MEASURES, **DEMO_MEASURES})
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(a: _Frame, b: _Frame) -> np.ndarray:
        """Where each pixel of `a` is in `b`, relative to itself: float32 [H, W, 2]."""
        return np.asarray(dis.calc(a.gray, b.gray, None))  # type: ignore[call-overload]

    reference = _Reference(max(1, round(REFERENCE * fps)))
    before: _Frame | None = None
    earlier: _Frame | None = None
    for index, pixels in enumerate(frames):
        now = _Frame(pixels, cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), None)
        values: Values = {}
        subject = np.zeros(now.gray.shape, bool)
        if before is not None:
            back = flow(now, before)
            values |= _motion(back, fps)
            values["flicker"] = _difference(pixels, _moved(before.pixels, back))
            subject = _moving(back) if prompt is None else subject
        if before is not None and earlier is not None and index % 2 == 0:
            across = flow(earlier, now)
            halves = _moved(earlier.pixels, across / -2), _moved(pixels, across / 2)
            between = cv2.addWeighted(halves[0], 0.5, halves[1], 0.5, 0)
            values["smoothness"] = 1 - _difference(before.pixels, between) / 255
        if prompt is not None:
            scene = demo_judge.read_scene(pixels)
            now = now._replace(scene=scene)
            rate = fps / min(now.gray.shape)
            values |= _demo_values(scene, before and before.scene, prompt, rate)
            subject = _inside(scene.outline, subject.shape)
        values |= reference.likeness(now, subject)
        tally.add(index, values)
        earlier, before = before, now
    return tally


class _Frame(NamedTuple):
    pixels: np.ndarray
    gray: np.ndarray
    scene: demo_judge.Scene | None


class _Reference:
    """Colors and gradients of the first frames, which all later ones are compared with."""

    def __init__(self, frames: int) -> None:
        self._frames, self._count = frames, 0
        self._color = np.zeros(3)
        self._first: dict[str, np.ndarray] = {}
        self._last: dict[str, np.ndarray] = {}

    def likeness(self, frame: _Frame, subject: np.ndarray) -> Values:
        """Consistency of the subject's pixels, bool [H, W], of the rest and of all gradients, and
        color drift."""
        lab = cv2.cvtColor(frame.pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        begins = self._count < self._frames
        color = lab.mean((0, 1))
        self._count += 1
        if begins:
            self._color += (color - self._color) / self._count
        values: Values = dict(colour_drift=float(np.linalg.norm(color - self._color)))
        parts = {
            "subject": _histogram(lab, subject) if subject.any() else None,
            "background": None if subject.all() else _histogram(lab, ~subject),
            "structure": _gradients(frame.gray),
        }
        for part, shares in parts.items():
            values[f"{part}_consistency"] = None
            if shares is None:
                continue
            if begins:
                self._first[part] = self._first.get(part, np.zeros_like(shares)) + shares
            first, last = self._first.get(part), self._last.get(part)
            self._last[part] = shares
            if first is not None and last is not None:
                like = _cosine if part == "structure" else _overlap
                both = like(shares, first) + like(shares, last)
                values[f"{part}_consistency"] = both / 2
        return values


def _histogram(lab: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Shares of L, a and b among the pixels of a mask, [3, BINS].

    Blurred by a bin, so that a color at the edge of two is not another one at the next frame.
    """
    mask = where.astype(np.uint8)
    rows = [
        cv2.calcHist([lab], [channel], mask, [BINS], list(bounds)).ravel()
        for channel, bounds in enumerate(LAB)
    ]
    blurred = cv2.GaussianBlur(np.stack(rows), (5, 1), 1, borderType=cv2.BORDER_REPLICATE)
    return blurred / np.maximum(blurred.sum(1, keepdims=True), 1e-9)


def _gradients(gray: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients (Dalal and Triggs, 2005) of the frame as `SIDE` x `SIDE`
    pixels: in every cell, lengths by direction without its sign, [cells x DIRECTIONS].

    A quarter of a gray level a pixel is added throughout, so that frames without any are alike.
    Lengths count as they are: scikit-image's `hog` scales every cell to 1, so that noise in an
    empty cell weighs as much as an edge.
    """
    small = cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    across, down = (cv2.Sobel(small, cv2.CV_32F, *d, scale=1 / 8) for d in ((1, 0), (0, 1)))
    length, angle = cv2.cartToPolar(across, down)
    direction = (angle * (DIRECTIONS / np.pi) + 0.5).astype(int) % DIRECTIONS
    row, column = np.indices(small.shape) // CELL
    place = (row * (SIDE // CELL) + column) * DIRECTIONS + direction
    sums = np.bincount(place.ravel(), length.ravel(), (SIDE // CELL) ** 2 * DIRECTIONS)
    return sums + CELL**2 / DIRECTIONS / 4


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Bhattacharyya's coefficient of histograms, averaged over rows: 1 for equal ones."""
    a, b = (h / h.sum(1, keepdims=True) for h in (a, b))
    return float(np.minimum(np.sqrt(a * b).sum(1), 1).mean())


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the angle between two vectors: 1 where they differ by a factor alone."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _motion(flow: np.ndarray, fps: float) -> Values:
    """VBench's dynamic degree: the mean of the longest 5% of the vectors, and its threshold."""
    lengths = np.linalg.norm(flow, axis=2).ravel()
    count = max(1, int(TOP * lengths.size))
    longest = np.partition(lengths, lengths.size - count)[-count:].mean()
    speed = float(longest) * fps / min(flow.shape[:2])  # short sides per second
    return {"motion": 100 * speed, "dynamic_degree": float(speed > 8 * DYNAMIC)}


def _moving(flow: np.ndarray) -> np.ndarray:
    """Where the flow differs from the camera's, its median: bool [H, W]."""
    camera = np.median(flow.reshape(-1, 2), 0)
    own = np.linalg.norm(flow - camera, axis=2)
    scale = max(float(own.max()), 1e-9) / 255
    level, _ = cv2.threshold((own / scale).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    return own > max(level * scale, MOVES)


def _moved(pixels: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The picture whose pixel at x is that of `pixels` at x + flow(x)."""
    rows, columns = flow.shape[:2]
    x, y = flow[..., 0] + np.arange(columns), flow[..., 1] + np.arange(rows)[:, None]
    maps = x.astype(np.float32), y.astype(np.float32)
    return cv2.remap(pixels, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in levels."""
    return float(cv2.absdiff(a, b).mean())


def _inside(outline: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    if outline is not None:
        cv2.drawContours(mask, [outline], -1, 1, cv2.FILLED)
    return mask.astype(bool)


def _demo_values(
    now: demo_judge.Scene, before: demo_judge.Scene | None, prompt: str, rate: float
) -> Values:
    """What the detectors see in a frame; a kind of word that the prompt leaves out is right.

    rate: frames a second over the short side in pixels.
    """
    words = set(re.findall(r"\w+", prompt.lower()))
    color, shape, ground = (
        float(not words & set(pool) or word in words)
        for word, pool in ((now.color, COLORS), (now.shape, SHAPES), (now.ground, GROUNDS))
    )
    values: Values = dict(
        colour=color, shape=shape, ground=ground, colour_and_shape=min(color, shape)
    )
    if before is not None and before.center and now.center:
        values["speed"] = 100 * math.dist(before.center, now.center) * rate
    return values


def format_value(value: float | None) -> str:
    """Format a value in four characters or so; "-" where nothing was measured."""
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def evaluations_json(evaluations: Iterable[Evaluation]) -> dict[str, Any]:
    """Return evaluations and what the measures mean, for JSON."""
    return {
        "videos": [msgspec.to_builtins(evaluation) for evaluation in evaluations],
        "measures": {
            name: {"better": measure.better, "meaning": measure.meaning}
            for name, measure in ALL_MEASURES.items()
        },
    }

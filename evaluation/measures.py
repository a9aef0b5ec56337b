"""How well a video holds, ten seconds at a time. NumPy, OpenCV and PyAV; no network.

The measures carry the names of VBench's dimensions (https://arxiv.org/abs/2311.17982) where they
ask the same, but not its networks: histograms of colours and of oriented gradients stand in for
DINO and CLIP, DIS optical flow for RAFT and for the interpolator AMT. So their values compare
videos with each other, not with published scores. `MEASURES` defines each; docs/compare.md says it
at more length.

What the demo model was asked to show is read exactly, by the detectors of its own world
(`packforcing.evaluation.demo_judge`); given the prompt, they also say which pixels are the subject.
In any other video the subject is what moves against the camera.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np

from packforcing.errors import VideoError
from packforcing.evaluation import demo_judge
from packforcing.presets import model_config
from packforcing.words import COLOURS, GROUNDS, SHAPES, encode_words

SEGMENT = 10.0  # seconds
SHORT_SIDE = (32, 480)  # pixels: below, flow finds nothing; above, frames are measured smaller
REFERENCE = 1.0  # seconds at the start that the rest is compared with
DYNAMIC = 6 / 256  # short sides a second / 8: VBench's threshold, on frames 1/8 s apart
TOP = 0.05  # of the flow vectors, the longest: VBench's dynamic degree
MOVES = 0.25  # pixels a frame, against the camera, from which on something is a subject
BINS = 32  # of a histogram, for each of L, a, b
SIDE, CELL, DIRECTIONS = 128, 16, 8  # of oriented gradients: pixels of a frame, of a cell; bins
LAB = ((0.0, 100.0), (-110.0, 110.0), (-110.0, 110.0))  # what sRGB reaches, about


class Measure(NamedTuple):
    head: str  # of a column
    better: str  # "higher", "lower" or "" where neither is
    meaning: str


MEASURES = {
    "subject_consistency": Measure(
        "subject", "higher", "likeness of the subject's colours to the first second's and to the "
        "frame before's, half and half; 0 to 1",
    ),
    "background_consistency": Measure("backgr.", "higher", "the same of all other pixels; 0 to 1"),
    "structure_consistency": Measure(
        "struct.", "higher", "likeness of the frame's oriented gradients to the first second's and "
        "to the frame before's, half and half; 0 to 1",
    ),
    "colour_drift": Measure(
        "drift", "lower", "distance of the frame's mean colour from the first second's, in CIELAB"
    ),
    "motion": Measure(
        "motion", "", "the fastest 5% of the optical flow, in % of the short side per second"
    ),
    "dynamic_degree": Measure("dynamic", "", "share of frames whose motion is above 18.75%"),
    "smoothness": Measure(
        "smooth", "higher", "likeness of every second frame to what flow makes of its neighbours; "
        "0 to 1",
    ),
    "flicker": Measure(
        "flicker", "lower", "difference to the frame before moved along the flow, in levels of 255"
    ),
}  # fmt: skip
DEMO_MEASURES = {
    "colour": Measure("colour", "higher", "share of frames whose subject has the colour named"),
    "shape": Measure("shape", "higher", "share of frames whose subject has the shape named"),
    "colour_and_shape": Measure("both", "higher", "share of frames where both are right"),
    "ground": Measure("ground", "higher", "share of frames over a ground that is named"),
    "speed": Measure("speed", "", "of the subject, in % of the short side per second"),
    "returns": Measure("returns", "", "times the camera came back to a place of a tour"),
    "loop_closure": Measure(
        "loop", "lower", "share of a place's landmarks that differ from the first visit's; 0 to 1"
    ),
}
Values = dict[str, float | None]  # by measure; None where there was nothing to measure


class Segment(msgspec.Struct, frozen=True):
    """Mean values from `start` to `stop`, in seconds; `returns` is a count."""

    start: float
    stop: float
    values: Values


class Evaluation(msgspec.Struct, frozen=True):
    """What was measured of a video; `values` are those of all of it."""

    video: str
    prompt: str | None
    fps: float
    frames: int
    width: int
    height: int
    values: Values
    segments: list[Segment]


def evaluate(
    video: str | os.PathLike[str],
    prompt: str | None = None,
    on_frame: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures a video file in bounded memory, however long it is.

    prompt: what the demo model was asked to show; adds `DEMO_MEASURES`. on_frame is told how many
    frames were read, of how many (a tour's are read twice). Raises `VideoError`, and `PromptError`
    for a prompt that is not the demo model's.
    """
    path = Path(video)
    fps, count, size = probe(path)
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

    tally = measure(frames(0), fps, prompt)
    if tally.frames < 3:
        raise VideoError(f"{path} has {tally.frames} frames: three are needed to measure anything")
    if prompt is not None:
        for found in demo_judge.returns(prompt, frames(tally.frames) if tour else ()):
            tally.add(found.frame, {"loop_closure": found.error, "returns": 1.0})
    return Evaluation(str(path), prompt, fps, tally.frames, *size, tally.total(), tally.segments())


class Tally:
    """Sums of per-frame values by segment."""

    def __init__(self, fps: float, names: Iterable[str]) -> None:
        self.fps, self.frames, self._names = fps, 0, list(names)
        self._sums: list[dict[str, list[float]]] = []

    def add(self, frame: int, values: Values) -> None:
        """Values of frame number `frame`; None is left out."""
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
        length = self.frames / self.fps
        return [
            Segment(i * SEGMENT, min((i + 1) * SEGMENT, length), self._means([sums]))
            for i, sums in enumerate(self._sums)
        ]

    def total(self) -> Values:
        return self._means(self._sums)

    def _means(self, segments: list[dict[str, list[float]]]) -> Values:
        means: Values = {}
        for name in self._names:
            pairs = [sums[name] for sums in segments if name in sums]
            total, count = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
            means[name] = total if name == "returns" else total / count if count else None
        return means


def measure(frames: Iterable[np.ndarray], fps: float, prompt: str | None = None) -> Tally:
    """Measures frames, uint8 RGB [H, W, 3], as they come; two of them are kept.

    All but `returns` and `loop_closure`, which take another pass over a tour's frames.
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
            seen = demo_judge.read(pixels)
            now = now._replace(seen=seen)
            rate = fps / min(now.gray.shape)
            values |= _demo_values(seen, before and before.seen, prompt, rate)
            subject = _inside(seen.outline, subject.shape)
        values |= reference.compare(now, subject)
        tally.add(index, values)
        earlier, before = before, now
    return tally


class _Frame(NamedTuple):
    pixels: np.ndarray
    gray: np.ndarray
    seen: demo_judge.Reading | None


class _Reference:
    """Colours and gradients of the first frames, which all later ones are compared with."""

    def __init__(self, frames: int) -> None:
        self._frames, self._seen = frames, 0
        self._colour = np.zeros(3)
        self._first: dict[str, np.ndarray] = {}
        self._last: dict[str, np.ndarray] = {}

    def compare(self, frame: _Frame, subject: np.ndarray) -> Values:
        """Consistency of the subject's pixels, bool [H, W], of the rest, and of all gradients;
        colour drift."""
        lab = cv2.cvtColor(frame.pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        begins = self._seen < self._frames
        colour = lab.mean((0, 1))
        self._seen += 1
        if begins:
            self._colour += (colour - self._colour) / self._seen
        values: Values = {"colour_drift": float(np.linalg.norm(colour - self._colour))}
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
                like = _cosine if part == "structure" else _likeness
                both = like(shares, first) + like(shares, last)
                values[f"{part}_consistency"] = both / 2
        return values


def _histogram(lab: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Shares of L, a and b among the pixels of a mask, [3, BINS].

    Blurred by a bin, so that a colour at the edge of two is not another one at the next frame.
    """
    chosen = where.astype(np.uint8)
    rows = [
        cv2.calcHist([lab], [channel], chosen, [BINS], list(bounds)).ravel()
        for channel, bounds in enumerate(LAB)
    ]
    blurred = cv2.GaussianBlur(np.stack(rows), (5, 1), 1, borderType=cv2.BORDER_REPLICATE)
    return blurred / np.maximum(blurred.sum(1, keepdims=True), 1e-9)


def _gradients(gray: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients (Dalal and Triggs, 2005) of the frame as `SIDE` x `SIDE`
    pixels: in every cell, lengths by direction without its sign, [cells x DIRECTIONS].

    A quarter of a grey level a pixel is added throughout, so that frames without any are alike.
    """
    small = cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    across, down = (cv2.Sobel(small, cv2.CV_32F, *d, scale=1 / 8) for d in ((1, 0), (0, 1)))
    length, angle = cv2.cartToPolar(across, down)
    direction = (angle * (DIRECTIONS / np.pi) + 0.5).astype(int) % DIRECTIONS
    row, column = np.indices(small.shape) // CELL
    place = (row * (SIDE // CELL) + column) * DIRECTIONS + direction
    sums = np.bincount(place.ravel(), length.ravel(), (SIDE // CELL) ** 2 * DIRECTIONS)
    return sums + CELL**2 / DIRECTIONS / 4


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
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
    """The picture whose pixel at x is the given one's at x + flow(x)."""
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
    now: demo_judge.Reading, before: demo_judge.Reading | None, prompt: str, rate: float
) -> Values:
    """What the detectors say of a frame; a kind of word that the prompt leaves out is right.

    rate: frames a second over the short side in pixels.
    """
    words = set(re.findall(r"\w+", prompt.lower()))
    right = {
        name: float(not words & set(pool) or getattr(now, name) in words)
        for name, pool in (("colour", COLOURS), ("shape", SHAPES), ("ground", GROUNDS))
    }
    values: Values = {**right, "colour_and_shape": min(right["colour"], right["shape"])}
    if before is not None and before.centre and now.centre:
        values["speed"] = 100 * math.dist(before.centre, now.centre) * rate
    return values


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Frames of a file, uint8 RGB [H, W, 3], none larger than `SHORT_SIDE`; raises `VideoError`."""
    import av

    done = 0
    try:
        with av.open(path.absolute()) as container:  # no protocol before a colon in it
            stream = container.streams.video[0]
            shrink = min(1.0, SHORT_SIDE[1] / min(stream.width, stream.height))
            width, height = round(stream.width * shrink), round(stream.height * shrink)
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24", width=width, height=height)
                done += 1
    except (OSError, av.FFmpegError) as error:
        raise VideoError(f"{path} is damaged after {done} frames: {error.strerror}") from error


def probe(path: Path) -> tuple[float, int, tuple[int, int]]:
    """Frames per second, how many frames (0 where the file does not say), width and height of a
    video; raises `VideoError`."""
    import av

    try:
        with path.open("rb"):
            pass  # gives a plainer reason than the decoders do
        with av.open(path.absolute()) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video; name a file that does, like .mp4")
            stream = container.streams.video[0]
            rate, size = stream.average_rate, (stream.width, stream.height)
            count = stream.frames or int((container.duration or 0) / 1e6 * float(rate or 0))
    except (OSError, av.FFmpegError) as error:
        raise VideoError(
            f"cannot read {path}: {error.strerror}; name a video file, like .mp4 or .mkv"
        ) from error
    if not rate:
        raise VideoError(f"{path} does not say how many frames a second it has")
    if min(size) < SHORT_SIDE[0]:
        raise VideoError(
            f"{path} is {size[0]}x{size[1]}: too small to measure, {SHORT_SIDE[0]} pixels at least"
        )
    return float(rate), count, size


def table(found: Evaluation) -> Iterator[str]:
    """Lines of text: a row per segment, a column per measure, and the whole video."""
    length = found.frames / found.fps
    yield f"{found.video}: {found.width}x{found.height}, {length:.1f} s"
    measures = {**MEASURES, **DEMO_MEASURES}
    yield f"{'seconds':>11}" + "".join(f"{measures[name].head:>9}" for name in found.values)
    for segment in found.segments:
        span = f"{segment.start:g}-{segment.stop:g}"
        yield f"{span:>11}" + "".join(f"{shown(value):>9}" for value in segment.values.values())
    if len(found.segments) > 1:
        yield f"{'all':>11}" + "".join(f"{shown(value):>9}" for value in found.values.values())


def shown(value: float | None) -> str:
    """A value in four characters or so; "-" where nothing was measured."""
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def described(found: Iterable[Evaluation]) -> dict[str, Any]:
    """All of it for a program, with what the measures mean."""
    return {
        "videos": [msgspec.to_builtins(one) for one in found],
        "measures": {
            name: {"better": one.better, "meaning": one.meaning}
            for name, one in {**MEASURES, **DEMO_MEASURES}.items()
        },
    }

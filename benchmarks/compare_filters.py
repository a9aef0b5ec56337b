"""Measure what `render --interpolate 2` and `--scale 2` lose against frames that the model makes.

    python -m benchmarks.compare_filters [--prompts N] [--seconds N] [--json FILE]

Videos of the demo model are the truth. Of each, every second frame is dropped and made again, and
frames are shrunk to half their size (mean of 2x2 pixels) and enlarged again: by the filters, and by
repeating frames or pixels. PSNR, SSIM and GMSD are of what was made again; the other columns are
those of `packforcing evaluate`, over whole videos.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from packforcing import model_config
from packforcing.evaluation.fidelity import frame_fidelity
from packforcing.evaluation.measures import ALL_MEASURES, evaluate_video
from packforcing.evaluation.prompt_sets import draw_prompts
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.video_files import open_video
from packforcing.runtime.video_filters import VideoFilters

CONFIG = model_config("demo")
MEASURES = ("color", "shape", "ground", "smoothness", "flicker")  # by their titles
KEYS = {measure.title: name for name, measure in ALL_MEASURES.items()}
TRUTH = "every frame of the model"


def remade(frames: np.ndarray) -> dict[str, tuple[np.ndarray, slice]]:
    """Make frames again; return those of each way, and which of them were made.

    Args:
        frames: Of a video, uint8 RGB [T, H, W, 3]; an even number.
    """
    half = frames[::2]
    interpolated = np.concatenate(list(VideoFilters(interpolate=2).apply([half])))
    count, height, width, _ = frames.shape
    small = frames.reshape(count, height // 2, 2, width // 2, 2, 3).mean((2, 4))
    small = np.rint(small).astype(np.uint8)
    scaled = np.concatenate(list(VideoFilters(scale=2).apply([small])))
    added, everything = slice(1, -1, 2), slice(None)  # nothing follows the last frame
    return {
        TRUTH: (frames, everything),
        "half of them, interpolated": (interpolated, added),
        "half of them, each shown twice": (half.repeat(2, 0), added),
        "half the size, scaled": (scaled, everything),
        "half the size, pixels repeated": (small.repeat(2, 1).repeat(2, 2), everything),
    }


def measure(frames: np.ndarray, truth: np.ndarray, part: slice, prompt: str) -> dict[str, float]:
    """Compare frames with the truth, and evaluate them as a video."""
    psnr, ssim, gmsd = frame_fidelity(frames[part], truth[part])
    size = CONFIG.width, CONFIG.height, CONFIG.fps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mkv"
        with open_video(path, *size) as video:
            video.write(np.ascontiguousarray(frames))
        values = evaluate_video(path, prompt).values
    fidelity = {} if psnr is None else {"psnr": psnr, "ssim": ssim, "gmsd": gmsd}
    shown = {title: values.get(KEYS[title]) for title in MEASURES}
    return fidelity | {title: value for title, value in shown.items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    ways: dict[str, list[dict[str, float]]] = {}
    with Session.open(demo_bundle()) as session:
        for prompt in draw_prompts(CONFIG, args.prompts, 0):
            frames = np.concatenate(list(session.stream(prompt.text, args.seconds, prompt.seed)))
            truth = frames[: len(frames) // 2 * 2]
            for way, (again, part) in remade(truth).items():
                ways.setdefault(way, []).append(measure(again, truth, part, prompt.text))
            print(f"{prompt.text}: {ways['half of them, interpolated'][-1]}", flush=True)
    means = {
        way: {
            name: float(np.mean([value[name] for value in values if name in value]))
            for name in ("psnr", "ssim", "gmsd", *MEASURES)
            if any(name in value for value in values)
        }
        for way, values in ways.items()
    }
    print(text := json.dumps(means, indent=1))
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

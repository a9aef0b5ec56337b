"""A page about one render: what it shows, how fast it was, what it kept in memory and read.

One HTML file that loads nothing from elsewhere, so that it can be kept beside the video.
"""

from __future__ import annotations

import base64
import html
import importlib.metadata
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from packforcing.config import Config, Policy
from packforcing.errors import OutputError
from packforcing.files import partial_path

if TYPE_CHECKING:
    from packforcing.runtime import BlockInfo, RenderSummary

SAMPLES, SAMPLE_WIDTH = 12, 256  # pictures of the video, and their width in pixels at most
RUNTIME = ("packforcing", "onnxruntime", "onnxruntime-gpu", "numpy", "av")


def write_report(
    path: Path,
    video: Path,
    prompt: str,
    seed: int,
    config: Config,
    blocks: list[BlockInfo],
    summary: RenderSummary,
    memory: dict[str, int],
    tools: dict[str, str],
) -> None:
    """Writes the page about `video`, whole or not at all; raises `OutputError`.

    memory: bytes by buffer; tools: what the bundle was made with.
    """
    policy = config.policy
    length = summary.frames / config.fps
    per_block = [block.seconds for block in blocks]
    facts = {
        "Model": f"{config.name}, {config.width}x{config.height}, {config.fps} frames/s",
        "Seed": str(seed),
        "History": str(policy),
        "Length": f"{summary.frames} frames, {length:.1f} s, in {summary.blocks} blocks",
        "Time": f"{summary.seconds_total:.1f} s, {length / summary.seconds_total:.1f} times "
        "as fast as it plays",
        "Time per block": f"median {statistics.median(per_block) * 1e3:.0f} ms, "
        f"longest {max(per_block) * 1e3:.0f} ms; "
        f"a block plays for {config.block_pixel_frames / config.fps * 1e3:.0f} ms",
    }
    spent = {**summary.seconds_graphs, "writing the video": summary.seconds_video}
    spent["everything else"] = max(0.0, summary.seconds_total - sum(spent.values()))
    kept = {
        name.replace("_", " "): count
        for name, count in memory.items()
        if name != "archive_per_block"
    }
    kept["archive of this video"] = summary.archive_bytes
    page = _PAGE.format(
        style=STYLE,
        prompt=html.escape(prompt),
        video=html.escape(video.name),
        pictures=_pictures(video, summary.frames, config.fps),
        facts=rows({name: (text,) for name, text in facts.items()}),
        durations=_durations(per_block, config.block_pixel_frames / config.fps),
        spent=rows(
            {
                name: (
                    f"{seconds:.2f} s",
                    f"{seconds / summary.blocks * 1e3:.1f} ms",
                    f"{seconds / summary.seconds_total:.0%}",
                )
                for name, seconds in spent.items()
            }
        ),
        read_key=READ_KEY,
        reads=read_map([block.read for block in blocks], policy),
        kept=rows({name: (f"{count / 1e6:.2f} MB",) for name, count in kept.items()}),
        versions=rows(
            {
                "Rendered with": (versions(),),
                "Bundle made with": (", ".join(f"{k} {v}" for k, v in tools.items()),),
            }
        ),
    )
    save_page(path, page)


def save_page(path: Path, page: str) -> None:
    """Writes a page, whole or not at all; raises `OutputError`."""
    partial = partial_path(path)
    try:
        # arguments may hold bytes that are no text
        partial.write_text(page, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # renamed already if all went well


def _pictures(video: Path, frames: int, fps: int) -> str:
    """Frames spread over the video, first and last included, with their times."""
    figures = []
    for index, picture in sample_frames(video, frames, SAMPLES, SAMPLE_WIDTH):
        time = f"{index / fps:.1f} s"
        figures.append(
            f'<figure><img src="{embedded(picture, ".png")}" alt="frame at {time}">'
            f"<figcaption>{time}</figcaption></figure>"
        )
    return "".join(figures)


def sample_frames(
    video: Path, frames: int, samples: int, width: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Frames spread over a video of so many, first and last included: the number of each, and the
    picture, uint8 BGR, at most `width` pixels wide."""
    import av
    import cv2

    wanted = set(np.linspace(0, frames - 1, samples).round().astype(int).tolist())
    with av.open(video) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index not in wanted:
                continue
            picture: np.ndarray = frame.to_ndarray(format="bgr24")
            scale = min(1.0, width / frame.width)
            size = round(frame.width * scale), round(frame.height * scale)
            yield index, cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def embedded(picture: np.ndarray, suffix: Literal[".png", ".jpg"]) -> str:
    """A picture, uint8 BGR, as the address of itself."""
    import cv2

    data = base64.b64encode(cv2.imencode(suffix, picture)[1].tobytes()).decode()
    return f"data:image/{'jpeg' if suffix == '.jpg' else 'png'};base64,{data}"


def _durations(seconds: list[float], playing: float) -> str:
    """Time per block as bars, with a line at the time that the block plays for."""
    top = max(*seconds, playing, 1e-9) * 1.05
    width, height = 100.0, 20.0
    step = width / len(seconds)
    bars = "".join(
        f"M{i * step:.3f} {height}h{step * 0.8:.3f}v{-height * s / top:.3f}h{-step * 0.8:.3f}z"
        for i, s in enumerate(seconds)
    )
    level = height * (1 - playing / top)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" class="durations" '
        f'role="img" aria-label="time per block"><path class="mid" d="{bars}"/>'
        f'<path class="line" d="M0 {level:.3f}H{width:g}"/></svg>'
    )


def read_map(reads: Sequence[Sequence[int]], policy: Policy) -> str:
    """A square per block in context: across, the block being made; down, the block it read.

    reads: the archived blocks that each block read.
    """
    squares: dict[str, list[tuple[int, int]]] = {"sink": [], "mid": [], "recent": []}
    for now, archived in enumerate(reads):
        sink, recent = policy.full_resolution_blocks(now)
        squares["sink"] += [(now, old) for old in sink]
        squares["recent"] += [(now, old) for old in recent]
        squares["mid"] += [(now, old) for old in archived]
    paths = "".join(
        f'<path class="{name}" d="{"".join(f"M{x} {y}h.9v.9h-.9z" for x, y in cells)}"/>'
        for name, cells in squares.items()
    )
    count = len(reads)
    return (
        f'<svg viewBox="0 0 {count} {count}" class="reads" role="img" '
        f'aria-label="which earlier blocks each block read">{paths}</svg>'
    )


def rows(table: dict[str, tuple[str, ...]]) -> str:
    return "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in table.items()
    )


def versions() -> str:
    found = []
    for name in RUNTIME:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # onnxruntime comes in two packages, of which one is installed
    found.append(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    return ", ".join(found)


STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --faint: #6b7280;
  --line: #d9dce1; --sink: #c2571a; --mid: #2563a8; --recent: #9aa3ae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181c; --faint: #9aa3ae;
  --line: #343941; --sink: #f0935a; --mid: #6aa9ea; --recent: #59616c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--faint); }
a { color: var(--mid); }
.pictures { display: grid; grid-template-columns: repeat(6, 1fr); gap: .4rem; }
figure { margin: 0; }
img { display: block; width: 100%; border-radius: 4px; }
figcaption { color: var(--faint); font-size: .8rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: normal; color: var(--faint); padding: .2rem 1.5rem .2rem 0;
  white-space: nowrap; vertical-align: top; width: 1%; }
td { padding: .2rem 1.5rem .2rem 0; font-variant-numeric: tabular-nums; }
.numbers td { text-align: right; }
.numbers { width: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 3rem; }
svg { display: block; border-left: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.durations { width: 100%; height: 7rem; }
.reads { width: min(100%, 26rem); }
path.sink { fill: var(--sink); } path.mid { fill: var(--mid); }
path.recent { fill: var(--recent); }
path.line { stroke: var(--sink); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.key { white-space: nowrap; margin-right: 1em; }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
.sink::before { background: var(--sink); } .mid::before { background: var(--mid); }
.recent::before { background: var(--recent); }
"""

READ_KEY = """Across: the block being made. Down: the earlier block.
<span class="key sink">sink</span>
<span class="key mid">mid, from the archive</span>
<span class="key recent">recent</span>"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{prompt} - PackForcing</title>
<style>{style}</style>
<h1>{prompt}</h1>
<p>Frames from <a href="{video}">{video}</a>, first to last.</p>
<div class="pictures">{pictures}</div>
<h2>Render</h2>
<table>{facts}</table>
<h2>Time per block</h2>
<p>One bar per block, first to last. The line is how long a block plays: bars below it are faster
than real time.</p>
{durations}
<div class="pair">
<div>
<h2>Which blocks each block read</h2>
<p>{read_key}</p>
{reads}
</div>
<div>
<h2>Where the time went</h2>
<p>In all, per block, and the share.</p>
<table class="numbers">{spent}</table>
<h2>Memory by buffer</h2>
<p>Fixed from the first block on, but for the archive, which is host memory.</p>
<table class="numbers">{kept}</table>
</div>
</div>
<h2>Versions</h2>
<table>{versions}</table>
</html>
"""

"""Render a list of prompts, one video each; started again, it continues.

    python examples/batch_render.py prompts.txt videos --seconds 20

Every line of the file is a prompt. A finished video is skipped and an interrupted one is resumed,
so the program may be stopped at any time (Ctrl-C) and started again. A video is named by its line
and a hash of prompt, length and seed: a changed line makes a new video.

Needs `pip install "packforcing[cpu]"`, and no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import threading
from pathlib import Path

from packforcing import PackForcingError
from packforcing.errors import RenderStopped
from packforcing.runtime import Session, demo_bundle
from packforcing.text_files import decode_text


def render_all(
    session: Session, prompts: list[str], folder: Path, seconds: float, stopped: threading.Event
) -> int:
    """Render what is missing, print one line per video, and return how many failed."""
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    for number, prompt in enumerate(prompts):
        request = hashlib.sha256(f"{prompt}\n{seconds:g}\n{number}".encode()).hexdigest()
        path = folder / f"{number:03}-{request[:8]}.mp4"
        if stopped.is_set():
            break
        if path.exists():
            print(f"{path.name}  was there  {prompt}", flush=True)
            continue
        try:
            summary = session.render(prompt, seconds, path, seed=number, resume=True)
        except RenderStopped:
            print(f"{path.name}  stopped  {prompt}", flush=True)
        except PackForcingError as error:
            print(f"{path.name}  failed  {error}", flush=True)
            failures += 1
        else:
            generated = f"{summary.frames_generated} of {summary.frames} frames"
            seconds_text = f"{summary.seconds_generating:.1f} s"
            print(f"{path.name}  {generated} in {seconds_text}  {prompt}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="a text file, a prompt in each line")
    parser.add_argument("folder", type=Path, help="for the videos")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--bundle", default=demo_bundle())
    args = parser.parse_args()
    lines = decode_text(args.prompts.read_bytes()).splitlines()
    stopped = threading.Event()
    with Session.open(args.bundle) as session:

        def stop(*_: object) -> None:
            stopped.set()
            session.stop()  # within the current block; all blocks before it are on the disk

        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, stop)
        failures = render_all(
            session, list(filter(None, map(str.strip, lines))), args.folder, args.seconds, stopped
        )
    sys.exit("stopped: the same command continues" if stopped.is_set() else bool(failures))


if __name__ == "__main__":
    main()

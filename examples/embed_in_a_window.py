"""Show a video in a window while it is made.

    python examples/embed_in_a_window.py "a red star over navy stripes" --seconds 20

A thread renders blocks into a queue of four; the window's own loop takes frames from there at the
video's rate. `play` takes any display. Needs `pip install "packforcing[cpu]"` and Tk, no torch.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import tkinter
from collections.abc import Callable, Iterator

import numpy as np

from packforcing.errors import RenderStopped
from packforcing.runtime import Session, demo_bundle

Frames = Iterator[np.ndarray]  # uint8 RGB [H, W, 3]
Display = Callable[[Frames, int], None]  # shows frames at a rate


def show_in_window(frames: Frames, fps: int, zoom: int = 4) -> None:
    """Show frames at a rate until they end or the window is closed."""
    window = tkinter.Tk()
    label = tkinter.Label(window)
    label.pack()

    def show_next() -> None:
        if (frame := next(frames, None)) is None:
            return window.destroy()
        header = f"P6 {frame.shape[1]} {frame.shape[0]} 255 ".encode()
        label.picture = tkinter.PhotoImage(data=header + frame.tobytes()).zoom(zoom)
        label.configure(image=label.picture)
        return window.after(round(1000 / fps), show_next)

    show_next()
    window.mainloop()


def play(session: Session, prompt: str, seconds: float, display: Display) -> None:
    """Render in a thread and show each frame; the render stops when the display ends."""
    queued: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=4)
    stream = session.stream(prompt, seconds)  # checks its arguments here, in this thread
    errors: list[Exception] = []

    def produce() -> None:
        try:
            for block in stream:
                queued.put(block)
        except Exception as error:
            errors.append(error)
        queued.put(None)

    def consume() -> Iterator[np.ndarray]:
        while (block := queued.get()) is not None:
            yield block

    threading.Thread(target=produce).start()
    blocks = consume()
    try:
        display((frame for block in blocks for frame in block), session.config.fps)
    finally:
        session.stop()  # where the display ended first
        for _ in blocks:
            pass
    if errors and not isinstance(errors[0], RenderStopped):
        raise errors[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--bundle", default=demo_bundle())
    args = parser.parse_args()
    try:
        with Session.open(args.bundle) as session:
            play(session, args.prompt, args.seconds, show_in_window)
    except tkinter.TclError as error:
        sys.exit(f"no window: {error}; 'packforcing render' writes a file instead")


if __name__ == "__main__":
    main()

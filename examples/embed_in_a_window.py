"""Show a video in a window while it is made, and follow the prompts that are typed below it.

    python examples/embed_in_a_window.py "a red star over navy stripes"

A thread renders blocks into a queue; the window's own loop takes frames from there at the video's
rate. `play` takes any display. Needs `pip install "packforcing[cpu]"` and Tk, no torch.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import tkinter
from collections.abc import Callable, Iterator

import numpy as np

from packforcing import PackForcingError
from packforcing.runtime import Session, Video, demo_bundle

Frames = Iterator[np.ndarray]  # uint8 RGB [H, W, 3]
Display = Callable[[Frames, Video, int], None]  # shows frames of a video at a rate


def show_in_window(frames: Frames, video: Video, fps: int, zoom: int = 4) -> None:
    """Show frames until they end or the window is closed; switch to what is typed."""
    window = tkinter.Tk()
    kinds = tkinter.Label, tkinter.Entry, tkinter.Label
    picture, entry, message = (kind(window) for kind in kinds)
    for widget in picture, entry, message:
        widget.pack(fill="x")

    def switch(event: object = None) -> None:
        try:
            block = video.switch(entry.get(), over=2)
        except PackForcingError as error:
            message.configure(text=str(error))
        else:
            message.configure(text=f"from block {block}: {entry.get()}")

    def show_next() -> None:
        if (frame := next(frames, None)) is None:
            return window.destroy()
        header = f"P6 {frame.shape[1]} {frame.shape[0]} 255 ".encode()
        picture.image = tkinter.PhotoImage(data=header + frame.tobytes()).zoom(zoom)
        picture.configure(image=picture.image)
        return window.after(round(1000 / fps), show_next)

    entry.bind("<Return>", switch)
    entry.focus()
    show_next()
    window.mainloop()


def play(session: Session, prompt: str, seconds: float | None, display: Display) -> None:
    """Render in a thread and show each frame; the video stops when the display ends."""
    queued: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=2)
    video = session.begin(prompt, seconds=seconds)  # checks its arguments here, in this thread
    errors: list[Exception] = []

    def produce() -> None:
        try:
            for block in video:
                queued.put(block.frames)
        except Exception as error:
            errors.append(error)
        queued.put(None)

    def consume() -> Iterator[np.ndarray]:
        while (block := queued.get()) is not None:
            yield block

    threading.Thread(target=produce).start()
    blocks = consume()
    try:
        display((frame for block in blocks for frame in block), video, session.config.fps)
    finally:
        video.stop()  # where the display ended first
        for _ in blocks:
            pass
    if errors:
        raise errors[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--seconds", type=float, help="until the window is closed by default")
    parser.add_argument("--bundle", default=demo_bundle())
    args = parser.parse_args()
    try:
        with Session.open(args.bundle) as session:
            play(session, args.prompt, args.seconds, show_in_window)
    except tkinter.TclError as error:
        sys.exit(f"no window: {error}; 'packforcing render' writes a file instead")


if __name__ == "__main__":
    main()

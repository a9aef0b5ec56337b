"""Time two sessions at once against the same work one after the other, in one process.

    python -m benchmarks.compare_sessions

Prints, for the default threads and for one thread each, both times and their ratio.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

from packforcing.runtime import Session, demo_bundle

PROMPT = "a red star over navy stripes"
SECONDS = 10.0
ROUNDS = 3


def make_video(session: Session) -> None:
    for _ in session.stream(PROMPT, SECONDS):
        pass


def seconds_of(work: Callable[[list[Session]], None], sessions: list[Session]) -> float:
    began = time.perf_counter()
    work(sessions)
    return time.perf_counter() - began


def in_a_row(sessions: list[Session]) -> None:
    for session in sessions:
        make_video(session)


def at_once(sessions: list[Session]) -> None:
    threads = [threading.Thread(target=make_video, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    for threads in (None, 1):
        sessions = [Session.open(demo_bundle(), threads=threads) for _ in range(2)]
        in_a_row(sessions)  # warm
        rounds = [
            (seconds_of(in_a_row, sessions), seconds_of(at_once, sessions)) for _ in range(ROUNDS)
        ]
        row, once = (statistics.median(times) for times in zip(*rounds))
        print(
            f"threads {threads or 'by default'}: 2 videos of {SECONDS:g} s in a row {row:.1f} s, "
            f"at once {once:.1f} s, ratio {once / row:.2f}"
        )
        for session in sessions:
            session.close()


if __name__ == "__main__":
    main()

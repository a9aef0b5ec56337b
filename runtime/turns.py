"""Let threads take turns, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CHECK_SECONDS = 0.05  # between two checks of a thread that waits


class Turns:
    """One turn for several threads. A plain lock may go to the same thread again and again."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._batons: deque[threading.Lock] = deque()  # of who has the turn, then who waits

    @contextmanager
    def turn(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait for the turn and have it inside the block.

        Args:
            check: Called while waiting; what it raises ends the waiting.
        """
        baton = threading.Lock()
        with self._mutex:
            self._batons.append(baton)
            if len(self._batons) > 1:
                baton.acquire()
        try:
            while not baton.acquire(timeout=_CHECK_SECONDS):
                check()
            yield
        finally:
            with self._mutex:
                had_turn = self._batons[0] is baton
                self._batons.remove(baton)
                if had_turn and self._batons:
                    self._batons[0].release()


# Of all sessions with a thread for each core. ONNX Runtime's one pool for a process is no choice:
# with it no session may have threads of its own, nor may any of the program that we are in.
CPU_TURNS = Turns()

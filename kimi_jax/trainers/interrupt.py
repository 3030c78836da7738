"""Ctrl-C as a request: the loop finishes its step, saves, and leaves."""

import signal

from kimi_jax.training import distributed

_STEPS_BETWEEN_AGREEMENTS = 32


class Interrupted(Exception):
    """The run was asked to stop, and has saved where it is."""


class StopRequest:
    """Within the context, the first SIGINT or SIGTERM sets `requested`; a second one acts as usual."""

    def __init__(self):
        self._heard = False
        self._previous = {}

    @property
    def requested(self) -> bool:
        """Has process 0 been asked to stop? All processes ask at the same points of the program, and wait there."""
        return bool(distributed.agreed(self._heard))

    def requested_at(self, step: int) -> bool:
        """The same for a loop of short steps: several processes ask only now and then, as each time waits for all."""
        return (distributed.alone() or step % _STEPS_BETWEEN_AGREEMENTS == 0) and self.requested

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self._heard = True
        print("\nStopping: finishing this step and saving. Press Ctrl-C again to leave at once.", flush=True)
        signal.signal(number, self._previous[number])

"""The one progress bar of a run. Log lines go above it; without a terminal it is silent."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from globe.am.records import StepRecord
from globe.config.console import progress_bar
from globe.runs.tracking import Fanout


class Progress:
    """Counts the steps of all banks, and passes each on to the sinks."""

    def __init__(self, banks: int, steps: int, sinks: Fanout) -> None:
        self.banks, self.steps, self.sinks = banks, steps, sinks
        self._stack = ExitStack()
        self._done = 0

    def __enter__(self) -> Progress:
        self._bar = self._stack.enter_context(progress_bar(self.banks * self.steps, "step"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self, key: str) -> None:
        """Begin the next bank."""
        self._bar.set_description(key)

    def step(self, key: str, record: StepRecord) -> None:
        """Count one step of the bank `key`."""
        self.sinks.log(key, record.step, record.flat())
        self._bar.set_postfix(RelFrob=f"{record.relfrob:.4f}", refresh=False)
        self._bar.update(self._done + min(record.step, self.steps) - self._bar.n)

    def end(self) -> None:
        """End the bank, which is done, perhaps early, or was there already."""
        self._done += self.steps
        self._bar.update(self._done - self._bar.n)

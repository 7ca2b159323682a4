"""`python -m globe.train` whose second process is killed after some steps of a fit, as the system does for memory."""

from __future__ import annotations

import os
import signal
from typing import Any

import globe.fit.one_bank
from globe.am.records import StepRecord
from globe.fit.one_bank import fit_globe
from globe.train import main

LAST_STEP = 10


def dying(*args: Any, on_step: Any, **kwargs: Any) -> Any:
    def step(record: StepRecord) -> None:
        on_step(record)
        if record.step == LAST_STEP and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    return fit_globe(*args, on_step=step, **kwargs)


if __name__ == "__main__":
    globe.fit.one_bank.fit_globe = dying
    main()

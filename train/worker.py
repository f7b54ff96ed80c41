"""A training job in a process of its own: `python -m train.worker DATA_FOLDER JOB`.

It reads the job's folder, reports every step to the store, stops at a step boundary when asked to, and when it is killed
and started again goes on from its last checkpoint to the same weights.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

from steer.errors import SteerError
from steer.store import Jobs
from train.distill import StepReport
from train.promote import train_folder


def main(root: str, job: str) -> int:
    """Run the job's training; 0 when it is trained or cancelled, 1 when it failed (the store says why)."""
    jobs = Jobs(root)
    jobs.update(job, pid=os.getpid(), state="training")

    def progress(report: StepReport) -> None:
        jobs.add_loss(job, report.step, asdict(report))
        jobs.update(job, progress={"stage": "training", "done": report.step, "of": report.steps})

    try:
        train_folder(jobs.folder(job), progress, lambda: jobs.get(job).cancel)
    except (SteerError, OSError, RuntimeError) as error:
        jobs.update(job, state="failed", message=str(error), pid=None)
        return 1
    jobs.update(job, state="cancelled" if jobs.get(job).cancel else "swapping", pid=None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))

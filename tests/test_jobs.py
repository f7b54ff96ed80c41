"""Jobs: records that last, a training process that is killed, and a server that comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from steer import pocket
from steer.engine import Engine
from steer.errors import SteerError
from steer.server.promotions import Promotions
from steer.store import Job, Jobs
from steer.store.jobs import alive
from train.distill import DistillConfig


def wait(jobs: Jobs, job: str, seconds: float) -> Job:
    """Wait until a job has ended, for at most so long."""
    for thread in threading.enumerate():
        if thread.name == f"promotion-{job}":
            thread.join(seconds)
    return jobs.get(job)


def test_records_last_and_unknown_jobs_are_named(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = jobs.create("promotion", {"a": 1})
    jobs.update(job.id, state="training", progress={"done": 3, "of": 9})
    jobs.add_loss(job.id, 1, {"step": 1, "loss": 0.5})
    jobs.add_loss(job.id, 1, {"step": 1, "loss": 0.4})
    again = Jobs(tmp_path).get(job.id)
    assert (again.state, again.progress, again.active) == ("training", {"done": 3, "of": 9}, True)
    assert Jobs(tmp_path).losses(job.id) == [{"step": 1, "loss": 0.4}]
    with pytest.raises(SteerError, match="no such job: nope"):
        jobs.get("nope")
    with pytest.raises(ValueError, match="no field"):
        jobs.update(job.id, colour="red")
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerError, match="cannot keep jobs there"):
        Jobs(tmp_path / "file")


def test_a_killed_training_and_a_new_server_finish_the_job(engine: Engine, tmp_path: Path) -> None:
    """kill -9 on the training, then the server goes away; a new one takes the job up and ends it."""
    config = DistillConfig(steps=8, batch=8, checkpoint_every=2)
    vector, point = pocket.VECTORS / "accept.safetensors", pocket.recipe("accept")
    prompts, general = [h.messages for h in pocket.prompts("distill")[:40]], pocket.neutral("train")[:20]
    first = Promotions(engine, tmp_path)
    job = first.start(vector, point.strength, tokens=point.tokens, prompts=prompts, general=general, config=config)
    with pytest.raises(SteerError, match="wait for it or cancel it"):
        first.start(vector, 1.0)
    end = time.monotonic() + 120
    while len(first.jobs.losses(job.id)) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    first.close()
    pid = first.jobs.get(job.id).pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    while alive(pid):
        time.sleep(0.05)
    version = engine.weight_version
    second = Promotions(engine, tmp_path)
    done = wait(second.jobs, job.id, 180)
    second.close()
    assert done.state == "done", done.message
    assert [r["step"] for r in second.jobs.losses(job.id)] == list(range(1, 9))
    assert engine.weight_version == version + 1
    resumed = _weights(tmp_path / "jobs" / job.id / "weights")
    engine.update_weights(pocket.MODEL)

    from train.promote import train_folder

    (tmp_path / "jobs" / job.id / "checkpoint.safetensors").unlink()
    train_folder(tmp_path / "jobs" / job.id)
    straight = _weights(tmp_path / "jobs" / job.id / "weights")
    assert all(torch.equal(resumed[n], straight[n]) for n in straight), "a resumed run ends at the same bits"


def test_cancel_leaves_the_served_weights(engine: Engine, tmp_path: Path) -> None:
    version = engine.weight_version
    promotions = Promotions(engine, tmp_path)
    prompts = [h.messages for h in pocket.prompts("distill")[:20]]
    job = promotions.start(
        pocket.VECTORS / "accept.safetensors",
        0.5,
        tokens="prompt",
        prompts=prompts,
        config=DistillConfig(steps=500, batch=4),
    )
    end = time.monotonic() + 120
    while not promotions.jobs.losses(job.id) and time.monotonic() < end:
        time.sleep(0.05)
    promotions.cancel(job.id)
    done = wait(promotions.jobs, job.id, 60)
    promotions.close()
    assert done.state == "cancelled"
    assert engine.weight_version == version
    assert not (tmp_path / "jobs" / job.id / "weights").exists()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")

"""Promotions as jobs: a thread of the server follows each; the training is a process of its own that outlives the server.

    queued → sampling (engine) → training (own process) → swapping (engine) → proving (engine) → done

Every state is in the store before it begins, so a server that was killed takes its jobs up again where they stood.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer import pocket
from steer.engine import Engine
from steer.errors import SteerError
from steer.intervention import Intervention
from steer.pairs import Messages
from steer.pocket.judge import judge
from steer.scope import Scope
from steer.store import Job, Jobs
from steer.store.jobs import alive
from steer.vector import SteeringVector
from steer.verify import rate
from train.data import text_ids
from train.distill import DistillConfig
from train.promote import prepare, sample_decisions

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
RESTARTS = 3
PROOF_PROMPTS = 120


class Promotions:
    """All promotion jobs of one engine and data folder."""

    def __init__(self, engine: Engine, root: Path):
        self.engine = engine
        self.root = root
        self.jobs = Jobs(root)
        self._threads: dict[str, threading.Thread] = {}
        self._closing = threading.Event()
        for job in self.jobs.all():
            if job.active and job.kind == "promotion":
                self._follow(job.id)

    def start(
        self,
        vector: Path,
        strength: float,
        layers: Sequence[int] | None = None,
        tokens: Scope = "all",
        prompts: Sequence[Messages] = (),
        general: Sequence[Messages | str] = (),
        config: DistillConfig | None = None,
    ) -> Job:
        """Begin a promotion.

        Args:
            vector: file of the vector to promote.
            prompts: prompts to train on; empty: the pocket model's, if that is what is served.
            general: texts that must not change; empty: likewise.

        Raises:
            SteerError: another promotion is under way, there are no prompts, or the vector does not fit.
        """
        running = [j for j in self.jobs.all() if j.active]
        if running:
            raise SteerError(f"promotion {running[0].id} is still {running[0].state}: wait for it or cancel it")
        loaded = SteeringVector.load(vector)
        intervention = Intervention(loaded, strength, layers=tuple(layers) if layers else None, tokens=tokens)
        self.engine.check([intervention])
        if not prompts:
            if not self._is_pocket():
                raise SteerError("a promotion needs prompts to train on: give at least a few dozen, one a line")
            prompts, general = [h.messages for h in pocket.prompts("distill")], general or pocket.neutral("train")
        job = self.jobs.create(
            "promotion",
            {
                "intervention": intervention.record(), "name": loaded.name,
                "prompts": [list(p) for p in prompts], "general": list(general),
                "train": asdict(config or DistillConfig()), "base": self.engine.weights_path,
            },
        )  # fmt: skip
        loaded.save(self.jobs.folder(job.id) / "vector.safetensors")
        self._follow(job.id)
        return job

    def cancel(self, job: str) -> None:
        """Stop a job at its next step; the served weights stay as they are."""
        self.jobs.cancel(job)

    def close(self) -> None:
        """Stop following; running training goes on by itself and is taken up by the next server."""
        self._closing.set()
        for thread in self._threads.values():
            thread.join(5)

    # -- one job, in its thread -----------------------------------------------------------------------------------

    def _follow(self, job: str) -> None:
        self._threads[job] = threading.Thread(target=self._run, args=(job,), name=f"promotion-{job}", daemon=True)
        self._threads[job].start()

    def _run(self, job: str) -> None:
        try:
            state = self.jobs.get(job).state
            if state in ("queued", "sampling"):
                self._sample(job)
            if self.jobs.get(job).state == "training":
                self._train(job)
            if not self._closing.is_set() and self.jobs.get(job).state in ("swapping", "proving"):
                self._swap_and_prove(job)
        except Exception as error:  # whatever went wrong must stand in the job, where the user looks
            if not self._closing.is_set():
                log.exception("promotion %s failed", job)
                self.jobs.update(job, state="failed", message=f"{type(error).__name__}: {error}")

    def _intervention(self, job: Job) -> Intervention:
        vector = SteeringVector.load(self.jobs.folder(job.id) / "vector.safetensors")
        return Intervention.from_record(job.config["intervention"], lambda _hash: vector)

    def _sample(self, name: str) -> None:
        self.jobs.update(name, state="sampling", progress={"stage": "sampling", "done": 0, "of": 1})
        job = self.jobs.get(name)
        c = job.config
        config = DistillConfig(**c["train"])
        intervention = self._intervention(job)
        before = self._proof(job, [])
        with_vector = self._proof(job, [intervention])
        decisions = sample_decisions(self.engine, c["prompts"], [intervention], seed=config.seed * 100_003 + 17)
        texts = [text_ids(self.engine.tokenizer, t) for t in c["general"]]
        prepare(self.jobs.folder(name), c["base"], decisions, [intervention], texts, config)
        if self.jobs.get(name).cancel:
            self.jobs.update(name, state="cancelled")
            return
        result = {"before": before, "steered": with_vector} if before else {}
        self.jobs.update(name, state="training", result=result)

    def _train(self, name: str) -> None:
        starts = 0
        process: subprocess.Popen[bytes] | None = None
        while not self._closing.is_set():
            job = self.jobs.get(name)
            if job.state != "training":
                return
            if not alive(job.pid) and (process is None or process.poll() is not None):
                if starts > RESTARTS:
                    raise SteerError(
                        f"the training process ended {starts} times; see {self.jobs.folder(name)}/worker.log"
                    )
                with (self.jobs.folder(name) / "worker.log").open("ab") as output:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "train.worker", str(self.root), name],
                        stdout=output,
                        stderr=output,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                starts += 1
            self._closing.wait(POLL_SECONDS)

    def _swap_and_prove(self, name: str) -> None:
        job = self.jobs.get(name)
        before = self.engine.weight_version
        self.jobs.update(name, state="swapping", progress={"stage": "swapping", "done": 0, "of": 1})
        version = self.engine.update_weights(self.jobs.folder(name) / "weights")
        self.jobs.update(name, state="proving", progress={"stage": "proving", "done": 0, "of": 1})
        result: dict[str, Any] = dict(job.result)
        if proof := self._proof(job, []):
            result["after"] = proof
        result |= {
            "weights": str(self.jobs.folder(name) / "weights"),
            "weight_version": {"before": before, "after": version},
        }
        self.jobs.update(name, state="done", result=result, progress={"stage": "done", "done": 1, "of": 1})

    def _is_pocket(self) -> bool:
        return Path(self.engine.model).resolve() == pocket.MODEL.resolve()

    def _proof(self, job: Job, interventions: Sequence[Intervention]) -> dict[str, Any]:
        """Behaviour rate on held-out prompts by the exact judge, where the pocket model and a behaviour of it are served."""
        behaviour = job.config["name"]
        if not self._is_pocket() or behaviour not in pocket.BEHAVIOURS:
            return {}
        held_out = random.Random(0).sample(pocket.prompts("held_out"), PROOF_PROMPTS)
        answers = self.engine.generate(
            [h.messages for h in held_out], interventions, seed=1, temperature=pocket.TEMPERATURE
        )
        return asdict(rate(judge(behaviour, h.request, a.text) for h, a in zip(held_out, answers, strict=True)))

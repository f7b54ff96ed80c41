"""Jobs: long work that outlives the page and the server, as rows of a SQLite file and a folder each.

Every write is a transaction of its own with `synchronous=FULL`; the journal is the rollback journal, since write-ahead
logging loses data under SQLite before 3.51.3 (WAL-reset bug).
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import SteerError

ACTIVE = ("queued", "sampling", "training", "swapping", "proving")
ENDED = ("done", "failed", "cancelled")

MIGRATIONS = (
    """CREATE TABLE jobs (
        id TEXT PRIMARY KEY, kind TEXT NOT NULL, state TEXT NOT NULL, config TEXT NOT NULL,
        progress TEXT NOT NULL DEFAULT '{}', result TEXT NOT NULL DEFAULT '{}', message TEXT NOT NULL DEFAULT '',
        pid INTEGER, cancel INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, updated REAL NOT NULL)""",
    """CREATE TABLE losses (job TEXT NOT NULL, step INTEGER NOT NULL, report TEXT NOT NULL, PRIMARY KEY (job, step))""",
)


@dataclass(frozen=True)
class Job:
    """One row: state is one of ACTIVE or ENDED; config, progress and result are JSON objects."""

    id: str
    kind: str
    state: str
    config: dict[str, Any]
    progress: dict[str, Any]
    result: dict[str, Any]
    message: str
    pid: int | None
    cancel: bool
    created: float
    updated: float

    @property
    def active(self) -> bool:
        """Whether it still has something to do."""
        return self.state in ACTIVE


class Jobs:
    """The jobs of one data folder; any number of processes may use it at once."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        try:
            (self.root / "jobs").mkdir(parents=True, exist_ok=True)
            with self._connect() as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                for number, statement in enumerate(MIGRATIONS[version:], version + 1):
                    db.execute(statement)
                    db.execute(f"PRAGMA user_version = {number}")
        except (OSError, sqlite3.Error) as error:
            raise SteerError(f"{self.root}: cannot keep jobs there: {error}") from None

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.root / "steer.sqlite", timeout=30, isolation_level="IMMEDIATE")
        db.row_factory = sqlite3.Row
        try:
            db.execute("PRAGMA journal_mode = DELETE")
            db.execute("PRAGMA synchronous = FULL")
            with db:
                yield db
        finally:
            db.close()

    def folder(self, job: str) -> Path:
        """The job's own folder."""
        return self.root / "jobs" / job

    def create(self, kind: str, config: dict[str, Any]) -> Job:
        """A new job in state "queued"."""
        job, now = uuid.uuid4().hex[:12], time.time()
        self.folder(job).mkdir(parents=True)
        with self._connect() as db:
            db.execute(
                "INSERT INTO jobs (id, kind, state, config, created, updated) VALUES (?, ?, 'queued', ?, ?, ?)",
                (job, kind, json.dumps(config), now, now),
            )
        return self.get(job)

    def get(self, job: str) -> Job:
        """The job as it stands.

        Raises:
            SteerError: no such job.
        """
        with self._connect() as db:
            row = db.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
        if row is None:
            raise SteerError(f"no such job: {job}")
        return _job(row)

    def all(self) -> list[Job]:
        """All jobs, newest first."""
        with self._connect() as db:
            return [_job(row) for row in db.execute("SELECT * FROM jobs ORDER BY created DESC")]

    def update(self, job: str, **fields: Any) -> None:
        """Set fields: state, progress, result, message, pid."""
        unknown = set(fields) - {"state", "progress", "result", "message", "pid"}
        if unknown:
            raise ValueError(f"a job has no field {sorted(unknown)[0]!r}")
        values = [json.dumps(v) if isinstance(v, dict) else v for v in fields.values()]
        names = ", ".join(f"{name} = ?" for name in fields)
        with self._connect() as db:
            db.execute(f"UPDATE jobs SET {names}, updated = ? WHERE id = ?", (*values, time.time(), job))

    def cancel(self, job: str) -> None:
        """Ask the job to stop at its next step."""
        with self._connect() as db:
            db.execute("UPDATE jobs SET cancel = 1, updated = ? WHERE id = ?", (time.time(), job))

    def add_loss(self, job: str, step: int, report: dict[str, Any]) -> None:
        """Record a training step; a step that is run again after a resume replaces its row."""
        with self._connect() as db:
            db.execute("INSERT OR REPLACE INTO losses VALUES (?, ?, ?)", (job, step, json.dumps(report)))

    def losses(self, job: str) -> list[dict[str, Any]]:
        """The recorded steps in order."""
        with self._connect() as db:
            rows = db.execute("SELECT report FROM losses WHERE job = ? ORDER BY step", (job,)).fetchall()
        return [json.loads(r[0]) for r in rows]


def _job(row: sqlite3.Row) -> Job:
    values: dict[str, Any] = dict(row)
    for name in ("config", "progress", "result"):
        values[name] = json.loads(values[name])
    values["cancel"] = bool(values["cancel"])
    return Job(**values)


def alive(pid: int | None) -> bool:
    """Whether a process with this id runs and is not a zombie."""
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[-1].split()[0] != "Z"

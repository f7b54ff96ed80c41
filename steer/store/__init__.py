"""What must last: SQLite records."""

from __future__ import annotations

from steer.store.jobs import Job, Jobs

__all__ = ["Job", "Jobs"]

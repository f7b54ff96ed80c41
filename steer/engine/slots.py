"""What is scarce in the workers: slots of the table of vectors, and rows of the pooling matrix.

A vector in use is never evicted; when all slots are in use a request is refused. Rows are soon free again; who needs some waits.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer.errors import RefusedError
from steer.intervention import Intervention
from steer.vector import SteeringVector


def key_of(intervention: Intervention) -> str:
    """What a slot is known by: the vector's bytes and the layers it acts at. Strength and scope are per-token data."""
    return hashlib.sha256(f"{intervention.vector.hash}|{intervention.at}".encode()).hexdigest()


def contents(vector: SteeringVector, layers: Sequence[int]) -> tuple[list[float], list[bytes]]:
    """(separations, directions as float32 bytes) of these layers, as `SteerWorker.steer_register` takes them."""
    unit = [np.ascontiguousarray(vector.directions[n], dtype=np.float32).tobytes() for n in layers]
    return [float(vector.separation[n]) for n in layers], unit


@dataclass
class _Slot:
    index: int
    users: int = 0
    last_used: int = 0


class VectorSlots:
    """The front end's view of the tables; `rpc` reaches all workers."""

    def __init__(self, count: int, rpc: Callable[..., Awaitable[list[Any]]]):
        self.count = count
        self._rpc = rpc
        self._slots: dict[str, _Slot] = {}
        self._free = list(range(count))[::-1]
        self._clock = 0
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def hold(self, interventions: Sequence[Intervention]) -> AsyncIterator[None]:
        """Within the block, every vector is in the tables and stays there.

        Raises:
            RefusedError: all slots are in use by running requests.
        """
        held: list[_Slot] = []
        try:
            for intervention in interventions:
                async with self._lock:
                    slot = await self._place(intervention)
                    slot.users += 1
                    held.append(slot)
            yield
        finally:
            for slot in held:
                slot.users -= 1

    async def _place(self, intervention: Intervention) -> _Slot:
        key = key_of(intervention)
        self._clock += 1
        if key not in self._slots:
            index = self._vacant()
            layers = list(intervention.at)
            try:
                written = await self._rpc("steer_register", key, index, layers, *contents(intervention.vector, layers))
            except BaseException:
                self._free.append(index)
                raise
            if any(n != len(layers) for n in written):
                self._free.append(index)
                raise RefusedError(f'vector "{intervention.vector.name}" could not be written to all workers')
            self._slots[key] = _Slot(index)
        self._slots[key].last_used = self._clock
        return self._slots[key]

    @property
    def held(self) -> int:
        """Slots in use by running requests."""
        return sum(slot.users > 0 for slot in self._slots.values())

    def _vacant(self) -> int:
        if self._free:
            return self._free.pop()
        idle = [(slot.last_used, key) for key, slot in self._slots.items() if slot.users == 0]
        if not idle:
            raise RefusedError(
                f"all {len(self._slots)} vector slots are in use: wait, or start the engine with more slots"
            )
        return self._slots.pop(min(idle)[1]).index


MOST_SPANS = 8  # read positions of one capture


def pool_rows(max_num_seqs: int) -> int:
    """Rows of the pooling matrix in an engine that runs so many requests at once."""
    return max(max_num_seqs, MOST_SPANS)


class PoolRows:
    """Rows of the pooling matrix that captures under way may need in one step; first come, first served."""

    def __init__(self, count: int):
        self._free = count
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, rows: int) -> AsyncIterator[None]:
        """Within the block, so many rows are ours."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= rows)
            self._free -= rows
        try:
            yield
        finally:
            async with self._changed:
                self._free += rows
                self._changed.notify_all()

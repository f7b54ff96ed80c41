"""Router: before each step it turns the requests in the batch into per-token rows for the taps, and counts what is really steered.

A request carries its steering as JSON text in `SamplingParams.extra_args["steer"]`:

    {"id": "…", "terms": [{"key", "a", "b", "keep", "tokens"}, …], "capture": {"layers": […], "spans": [[0, 9], …]}}

with a in separations and b as in the formula. The router knows nothing of vLLM's runners: it is given `Row`s.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from steer.engine.taps import Steering
from steer.scope import Scope, parse_scope, positions_of

KEPT = 16384  # receipts and captures whose request never asked for them are dropped beyond this
RING = 4  # pinned buffers in flight at once, where the host runs ahead of the device


class Row(NamedTuple):
    """A request's part of a step: rows [first, last) hold its positions [computed, …); its prompt has `prompt` tokens."""

    request: str
    first: int
    last: int
    computed: int
    prompt: int


class Term(NamedTuple):
    """One intervention as the worker uses it."""

    key: str
    a: float
    b: float
    keep: bool
    tokens: Scope


class Capture(NamedTuple):
    """Spans of positions [start, end) whose block outputs are averaged at these layers."""

    layers: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass
class Spec:
    """A request's steering."""

    id: str
    terms: list[Term]
    capture: Capture | None
    counted: int = 0  # positions below this have been counted: a preempted request runs some of them again


def parse(raw: str) -> Spec:
    """The spec in a request's extra arguments."""
    given = json.loads(raw)
    terms = [Term(t["key"], t["a"], t["b"], t["keep"], parse_scope(t["tokens"])) for t in given.get("terms", ())]
    return Spec(given["id"], terms, _capture(given.get("capture")))


def _capture(given: dict[str, Any] | None) -> Capture | None:
    if given is None:
        return None
    return Capture(tuple(given["layers"]), tuple((start, end) for start, end in given["spans"]))


class Staged:
    """A device buffer with a host side to write to; on CPU they are one."""

    def __init__(self, buffer: torch.Tensor):
        self.buffer = buffer
        self.on_gpu = buffer.is_cuda
        sides = [torch.zeros(buffer.shape, pin_memory=True) for _ in range(RING)] if self.on_gpu else [buffer]
        self.sides = [(side, side.numpy()) for side in sides]
        self.events: list[Any] = [None] * len(sides)
        self.dirty = [0] * len(sides)
        self.turn = 0

    def begin(self) -> np.ndarray:
        """The host side, all zero."""
        self.turn = (self.turn + 1) % len(self.sides)
        if self.events[self.turn] is not None:
            self.events[self.turn].synchronize()
        rows = self.sides[self.turn][1]
        rows[: self.dirty[self.turn]] = 0.0
        return rows

    def end(self, dirty: int) -> None:
        """The first `dirty` rows were written: bring them, and those of the step before, to the device."""
        before, self.dirty[self.turn] = max(self.dirty), dirty
        if self.on_gpu and (n := max(before, dirty)):
            self.buffer[:n].copy_(self.sides[self.turn][0][:n], non_blocking=True)
            self.events[self.turn] = torch.cuda.Event()
            self.events[self.turn].record()


class Router:
    """Fills the buffers of `Steering` for each step."""

    def __init__(self, steering: Steering):
        self.steering = steering
        self.slots: dict[str, int] = {}
        self.specs: dict[str, Spec] = {}
        self.steered: OrderedDict[str, int] = OrderedDict()
        self.captured: OrderedDict[str, tuple[np.ndarray, int]] = OrderedDict()  # id → [spans, layers, d_model], tokens
        self.add, self.scale, self.keep = Staged(steering.add), Staged(steering.scale), Staged(steering.keep)
        self.pool = Staged(steering.pool)
        self.pending: list[tuple[str, Capture, int, int]] = []  # rows of P in this step: id, what, span, tokens of it
        self.quiet = True

    def admit(self, request: str, extra_args: dict[str, Any] | None) -> None:
        """Take note of a new request's steering."""
        raw = (extra_args or {}).get("steer")
        if raw:
            self.specs[request] = parse(raw)

    def release(self, request: str) -> None:
        """Forget a request; its receipt stays until it is asked for."""
        self.specs.pop(request, None)

    def register(self, key: str, slot: int, layers: dict[int, tuple[float, torch.Tensor]]) -> None:
        """Write a vector into a slot of the table."""
        for old in [k for k, s in self.slots.items() if s == slot]:
            del self.slots[old]
        self.steering.write(slot, layers)
        self.slots[key] = slot

    def before(self, rows: Iterable[Row]) -> None:
        """Fill the buffers for the tokens about to run."""
        wanted = (
            [(row, spec) for row in rows if (spec := self.specs.get(row.request)) is not None] if self.specs else []
        )
        if not wanted and self.quiet:
            return
        s = self.steering
        add, scale, keep = self.add.begin(), self.scale.begin(), self.keep.begin()
        used, dirty = 0, 0
        s.scaling = s.keeping = False
        for row, spec in wanted:
            until = row.computed + row.last - row.first
            offset = row.first - row.computed
            touched = np.zeros(row.last - row.first, dtype=bool)
            for term in spec.terms:
                low, high = positions_of(term.tokens, row.prompt)
                low, high = max(low, row.computed), min(high, until)
                slot = self.slots.get(term.key)
                if slot is None or low >= high:
                    continue  # an unknown key leaves the count short, and the front end withholds the answer
                add[low + offset : high + offset, slot] += term.a
                if term.b:
                    scale[low + offset : high + offset, slot] += term.b
                    s.scaling = True
                if term.keep:
                    keep[low + offset : high + offset, slot] = 1.0
                    s.keeping = True
                touched[low - row.computed : high - row.computed] = True
                used, dirty = max(used, slot + 1), max(dirty, row.last)
            new = touched[max(0, spec.counted - row.computed) :]
            spec.counted = max(spec.counted, until)
            if spec.terms:
                self.steered[spec.id] = self.steered.get(spec.id, 0) + int(new.sum())
                while len(self.steered) > KEPT:
                    self.steered.popitem(last=False)
        for staged in (self.add, self.scale, self.keep):
            staged.end(dirty)
        s.used = used
        self._pool(wanted)
        self.quiet = not dirty and not s.pooled

    def _pool(self, wanted: Sequence[tuple[Row, Spec]]) -> None:
        """Fill the pooling matrix for the captures in this step."""
        pool = self.pool.begin()
        self.pending = []
        layers: set[int] = set()
        for row, spec in wanted:
            if (c := spec.capture) is None:
                continue
            offset = row.first - row.computed
            for span, (start, end) in enumerate(c.spans):
                low, high = max(start, row.computed), min(end, row.computed + row.last - row.first)
                if low < high and len(self.pending) < len(pool):
                    pool[len(self.pending), low + offset : high + offset] = 1.0 / (end - start)
                    self.pending.append((spec.id, c, span, high - low))
                    layers.update(c.layers)
        self.pool.end(len(self.pending))
        self.steering.pooled = len(self.pending)
        self.steering.pooled_layers = frozenset(layers)

    def after(self) -> None:
        """Take what the step's taps pooled."""
        if not self.pending:
            return
        layers = sorted(self.steering.pooled_layers)
        found = self.steering.captured[layers, : len(self.pending)].cpu().numpy()
        for index, (id_, capture, span, tokens) in enumerate(self.pending):
            part = found[[layers.index(layer) for layer in capture.layers], index]
            if id_ not in self.captured:
                self.captured[id_] = (np.zeros((len(capture.spans), *part.shape), np.float32), 0)
            sums, seen = self.captured[id_]
            sums[span] += part
            self.captured[id_] = (sums, seen + tokens)
            while len(self.captured) > KEPT:
                self.captured.popitem(last=False)
        self.pending = []

    def counts(self, ids: Sequence[str]) -> list[int]:
        """Tokens steered for each spec id; the counts are handed over and forgotten."""
        return [self.steered.pop(i, 0) for i in ids]

    def captures(self, ids: Sequence[str]) -> list[tuple[bytes, int]]:
        """(float32 bytes of `[spans, layers, d_model]`, tokens averaged) for each spec id, handed over and forgotten."""
        self.after()
        taken = [self.captured.pop(i, (np.zeros(0, np.float32), 0)) for i in ids]
        return [(mean.astype(np.float32).tobytes(), tokens) for mean, tokens in taken]

"""Block outputs of many texts on disk, read back a layer at a time, so that memory does not grow with the number of pairs.

One temporary file, laid out `[read position, layer, text, d_model]` in float32, written as the batches come and gone when closed.
It lies in the system's folder for temporary files (`TMPDIR` names another) and takes reads × layers × texts × d_model × 4 bytes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np

from steer.errors import SteerError

ROWS = 256  # rows held in memory at once where a whole layer is not needed


class Activations:
    """Block outputs of `count` texts at some read positions and layers."""

    def __init__(self, reads: int, layers: Sequence[int], count: int, width: int):
        self.layers, self.count, self.width = tuple(layers), count, width
        self._place = {layer: i for i, layer in enumerate(self.layers)}
        self._row = 4 * width
        self._file = tempfile.TemporaryFile(prefix="steer-activations-")  # noqa: SIM115
        size = reads * len(self.layers) * count * self._row
        free = os.statvfs(tempfile.gettempdir())
        if size > free.f_bavail * free.f_frsize:
            self._file.close()
            raise SteerError(
                f"the activations take {size / 2**30:.1f} GiB, more than {tempfile.gettempdir()} has room for: "
                "read fewer layers, or set TMPDIR"
            )

    def __enter__(self) -> Activations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _offset(self, read: int, layer: int, text: int) -> int:
        return ((read * len(self.layers) + self._place[layer]) * self.count + text) * self._row

    def write(self, texts: Sequence[int], values: np.ndarray) -> None:
        """Put down a batch: `values[read, layer, i]` are the block outputs of text `texts[i]`; `[reads, layers, batch, d_model]`."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        # runs of neighbouring texts, which batches of one length are full of when lengths are equal, go in one write
        order = np.argsort(texts, kind="stable")
        numbers = np.asarray(texts)[order]
        runs = np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) != 1) + 1)
        for read in range(values.shape[0]):
            for place, layer in enumerate(self.layers):
                rows = values[read, place, order]
                for run in runs:
                    part = np.ascontiguousarray(rows[run[0] : run[-1] + 1])
                    os.pwrite(self._file.fileno(), part.data, self._offset(read, layer, int(numbers[run[0]])))

    def rows(self, read: int, layer: int, first: int, last: int) -> np.ndarray:
        """Block outputs of texts [first, last) `[last − first, d_model]`."""
        self._file.seek(self._offset(read, layer, first))
        return np.fromfile(self._file, np.float32, (last - first) * self.width).reshape(-1, self.width)

    def chunks(self, read: int, layer: int, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first text, rows) over texts [first, last), at most `ROWS` at a time."""
        for start in range(first, last, ROWS):
            yield start, self.rows(read, layer, start, min(start + ROWS, last))

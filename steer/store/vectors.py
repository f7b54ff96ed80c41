"""The folder of vectors a server offers: one safetensors file each, known by its name or by its hash."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from steer.errors import InterventionError, VectorError
from steer.vector import SteeringVector

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class VectorStore:
    """Vectors by name, read when first used and again when their file changes.

    Args:
        folder: must exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, tuple[tuple[int, int], SteeringVector]] = {}

    def names(self) -> list[str]:
        """Names of the vectors there are, sorted."""
        return sorted(p.stem for p in self.folder.glob("*.safetensors") if not p.name.startswith("."))

    def get(self, name: str | None) -> SteeringVector:
        """The vector of a name or of a hash.

        Raises:
            VectorError: there is none, or its file is broken.
        """
        if not name:
            raise VectorError("choose a vector first")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise VectorError(f"a vector is named by letters, digits, dots and dashes, not {name!r:.60}")
        path = self.folder / f"{name}.safetensors"
        try:
            stat = path.stat()
        except OSError:
            return self._by_hash(name)
        state = (stat.st_mtime_ns, stat.st_size)
        if name not in self._read or self._read[name][0] != state:
            self._read[name] = (state, SteeringVector.load(path))
        return self._read[name][1]

    def _by_hash(self, digest: str) -> SteeringVector:
        if len(digest) == 64:
            for name in self.names():
                if (vector := self.get(name)).hash == digest:
                    return vector
        raise VectorError(f'there is no vector "{digest}": choose from {", ".join(self.names()) or "none"}')

    def resolve(self, reference: Any) -> SteeringVector:
        """`get` for `Intervention.from_record`.

        Raises:
            InterventionError: as `get`; its field is "vector".
        """
        try:
            return self.get(reference)
        except VectorError as error:
            raise InterventionError(str(error), "vector") from None

    def put(self, name: str, content: bytes, model: Any = None) -> SteeringVector:
        """Store a vector file under a name, replacing one of that name, once it is seen to be one.

        Args:
            content: of the safetensors file.
            model: what it must have been made on, as for `SteeringVector.load`.

        Raises:
            VectorError: a bad name, not a vector file, or another model's; nothing has changed then.
        """
        if not NAME.fullmatch(name):
            raise VectorError(f"a vector is named by letters, digits, dots and dashes, not {name!r:.60}")
        handle, partial = tempfile.mkstemp(dir=self.folder, prefix=".upload-")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            try:
                vector = SteeringVector.load(partial, model=model)
            except VectorError as error:
                raise VectorError(str(error).replace(partial, name)) from None
            os.replace(partial, self.folder / f"{name}.safetensors")
        finally:
            Path(partial).unlink(missing_ok=True)
        return vector

    def remove(self, name: str) -> None:
        """Delete a vector's file; requests that use it run on.

        Raises:
            VectorError: there is none of that name.
        """
        if name not in self.names():
            raise VectorError(f'there is no vector "{name}"')
        (self.folder / f"{name}.safetensors").unlink()
        self._read.pop(name, None)

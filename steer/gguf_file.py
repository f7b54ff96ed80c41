"""GGUF control vectors: the file of repeng and llama.cpp, out and in.

`direction.{layer}` holds the whole step of a layer, direction times separation, so that their coefficient 1.0 is our strength 1.0. Layer numbers
are the same: N is the output of block N, from 0; llama.cpp takes none for layer 0. Layers whose separation is nothing have no step and are left out. What GGUF has no field for travels as JSON in `steer.metadata`,
which other readers pass over; a file without it has no fingerprint but its width, and no score.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from steer.arithmetic import SMALLEST
from steer.errors import VectorError
from steer.fingerprint import Fingerprint
from steer.vector import SteeringVector

ARCHITECTURE = "controlvector"


def write(vector: SteeringVector, path: str | Path) -> Path:
    """Write a control vector; its folder must exist.

    Raises:
        VectorError: no such folder, or a direction at layer 0, which llama.cpp does not take.
    """
    from gguf import GGUFWriter

    path = Path(path)
    if not path.parent.is_dir():
        raise VectorError(f"{path.parent}: no such folder to save the vector in")
    largest = max(abs(vector.separation[n]) for n in vector.layers)
    empty = [n for n in vector.layers if abs(vector.separation[n]) <= SMALLEST * largest]
    if len(empty) == len(vector.layers):
        raise VectorError(f'"{vector.name}" has no separation at any layer')
    vector = vector.without(*empty)
    if 0 in vector.directions:
        raise VectorError(
            f'"{vector.name}" has a direction at layer 0, which GGUF control vectors have not: leave it out'
        )
    writer = GGUFWriter(str(path), ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", vector.fingerprint.architecture)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vector.layers))
    writer.add_string("steer.metadata", json.dumps(vector.metadata(), sort_keys=True))
    for layer in vector.layers:
        step = vector.directions[layer] * np.float32(vector.separation[layer])
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(step, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: str | Path) -> SteeringVector:
    """Read a control vector of ours, repeng's or llama.cpp's.

    A foreign one acts at all its layers by default, as it would in llama.cpp.

    Raises:
        VectorError: no such file, or not a control vector.
    """
    from gguf import GGUFReader

    path = Path(path)
    if not path.is_file():
        raise VectorError(f"{path}: no such vector file")
    try:
        file = GGUFReader(str(path))
        if _text(file, "general.architecture") != ARCHITECTURE:
            raise VectorError(f"{path}: a GGUF file, but not a control vector")
        steps = {
            int(t.name.split(".", 1)[1]): np.array(t.data, dtype=np.float32).reshape(-1)
            for t in file.tensors
            if t.name.startswith("direction.")
        }
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise VectorError(f"{path}: not a readable GGUF file: {error}") from None
    sizes = {layer: float(np.linalg.norm(step)) for layer, step in steps.items()}
    empty = [layer for layer, size in sizes.items() if not 0 < size < np.inf]
    if not steps or empty:
        raise VectorError(f"{path}: holds no direction" + (f" at layer {min(empty)}" if empty else ""))
    raw = _text(file, "steer.metadata")
    directions = {layer: step / np.float32(sizes[layer]) for layer, step in steps.items()}
    if raw is not None:
        return SteeringVector.from_metadata(json.loads(raw), directions, str(path))
    hint = _text(file, f"{ARCHITECTURE}.model_hint") or ""
    return SteeringVector(
        directions=directions,
        separation=sizes,
        fingerprint=Fingerprint(width=len(next(iter(directions.values())))),
        selected=tuple(sorted(directions)),
        method="gguf",
        read="",
        name=path.stem,
        lineage={"op": "import", "of": [{"file": path.name, "model_hint": hint}]},
    )


def _text(file: Any, name: str) -> str | None:
    field = file.get_field(name)
    return None if field is None or not len(field.parts) else bytes(field.parts[-1]).decode("utf-8")

"""SteeringVector: one direction per layer, what is known of it, and its file.

The file is safetensors: `layers.{i}` float32 of unit norm, and one metadata entry `steer` of JSON. Nothing is pickled. GGUF control vectors
are read and written where a file's name ends so (`steer.gguf_file`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from steer.errors import VectorError
from steer.fingerprint import Fingerprint, fingerprint

FORMAT = 1
LARGEST_SEPARATION = 1e6


@dataclass(frozen=True)
class Score:
    """Held-out separation of positives from negatives by the projection: AUROC with a 95 % interval over pairs."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions in the block output, one unit vector per layer. Two are equal if their directions and separations are.

    Attributes:
        directions: layer → `[d_model]` float32, unit norm.
        separation: layer → mean projection of positives minus negatives, in activation units.
        residual_norm: layer → median norm of the block output at the read position.
        scores: layer → held-out score.
        selected: the layers an `Intervention` uses when it names none.
        fingerprint: the model it was read from.
        strength, tokens: the operating point found for it, which the page starts from.
        lineage: what the vector was made of, where it was not read off a model: {"op", "of": […]}.
    """

    directions: Mapping[int, np.ndarray]
    separation: Mapping[int, float]
    fingerprint: Fingerprint
    residual_norm: Mapping[int, float] = field(default_factory=dict)
    scores: Mapping[int, Score] = field(default_factory=dict)
    selected: tuple[int, ...] = ()
    method: str = "mean_difference"
    read: str = "last_prompt"
    name: str = "vector"
    poles: tuple[str, str] = ("positive", "negative")
    pairs_hash: str = ""
    split_hashes: Mapping[str, str] = field(default_factory=dict)
    strength: float = 1.0
    tokens: str = "all"
    lineage: Mapping[str, Any] = field(default_factory=dict)
    mismatch_allowed: bool = False

    def __post_init__(self) -> None:
        if not self.directions:
            raise VectorError("a steering vector needs at least one layer")
        widths = {d.shape for d in self.directions.values()}
        if len(widths) != 1 or len(next(iter(widths))) != 1:
            raise VectorError("the directions of a steering vector must be vectors of one width")
        for layer, direction in self.directions.items():
            norm = float(np.linalg.norm(direction))
            if not abs(norm - 1.0) < 1e-3:
                raise VectorError(f"layer {layer}: the direction has norm {norm:.4g}, not 1")
            if not abs(self.separation.get(layer, np.nan)) <= LARGEST_SEPARATION:
                raise VectorError(
                    f"layer {layer}: the separation is missing, not finite or above {LARGEST_SEPARATION:g}"
                )
        for layer in self.selected:
            if layer not in self.directions:
                raise VectorError(f"selected layer {layer} is not among the vector's layers {self.layers}")

    @property
    def layers(self) -> list[int]:
        """Layers that have a direction, ascending."""
        return sorted(self.directions)

    @property
    def width(self) -> int:
        """d_model."""
        return next(iter(self.directions.values())).shape[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SteeringVector) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of directions and separations: what an intervention and a receipt call the vector by."""
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(f"{layer}:{self.separation[layer]!r}:".encode())
            digest.update(np.ascontiguousarray(self.directions[layer], dtype="<f4").tobytes())
        return digest.hexdigest()

    def select(self, *layers: int) -> SteeringVector:
        """The same vector, used at these layers by default."""
        return replace(self, selected=tuple(layers))

    def without(self, *layers: int) -> SteeringVector:
        """The same vector with no direction at these layers.

        Raises:
            VectorError: none would be left, or none it is used at.
        """
        kept = [n for n in self.layers if n not in layers]
        selected = tuple(n for n in self.selected if n in kept)
        if not kept or (self.selected and not selected):
            raise VectorError(f'"{self.name}" would be left without a layer to act at')
        return replace(
            self,
            directions={n: self.directions[n] for n in kept},
            separation={n: self.separation[n] for n in kept},
            residual_norm={n: v for n, v in self.residual_norm.items() if n in kept},
            scores={n: v for n, v in self.scores.items() if n in kept},
            selected=selected,
        )

    def use(self, layer: int, strength: float, tokens: str = "all") -> SteeringVector:
        """The same vector with another operating point."""
        return replace(self, selected=(layer,), strength=strength, tokens=tokens)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """See `steer.arithmetic.add`."""
        from steer.arithmetic import add

        return add(self, other)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        """See `steer.arithmetic.subtract`."""
        from steer.arithmetic import subtract

        return subtract(self, other)

    def __mul__(self, factor: float) -> SteeringVector:
        """See `steer.arithmetic.multiply`."""
        from steer.arithmetic import multiply

        return multiply(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def orthogonal(self, other: SteeringVector) -> SteeringVector:
        """See `steer.arithmetic.orthogonal`."""
        from steer.arithmetic import orthogonal

        return orthogonal(self, other)

    def metadata(self) -> dict[str, Any]:
        """What the file says besides the directions."""
        return {
            "format": FORMAT,
            "library": _library_version(),
            "hook_site": "block_output",
            "name": self.name,
            "poles": list(self.poles),
            "method": self.method,
            "read": self.read,
            "layers": self.layers,
            "selected": list(self.selected),
            "operating_point": {"strength": self.strength, "tokens": self.tokens},
            "separation": {str(k): float(v) for k, v in self.separation.items()},
            "residual_norm": {str(k): float(v) for k, v in self.residual_norm.items()},
            "scores": {str(k): asdict(v) for k, v in self.scores.items()},
            "fingerprint": asdict(self.fingerprint),
            "pairs_hash": self.pairs_hash,
            "split_hashes": dict(self.split_hashes),
            "lineage": dict(self.lineage),
        }

    @staticmethod
    def from_metadata(meta: Mapping[str, Any], directions: Mapping[int, np.ndarray], where: str) -> SteeringVector:
        """The vector that `metadata` and its directions were taken of.

        Raises:
            VectorError: a field is missing or broken; `where` is named.
        """
        try:
            if meta["format"] != FORMAT:
                raise VectorError(f"{where}: format version {meta['format']}; this version of steer reads {FORMAT}")
            return SteeringVector(
                directions=directions,
                separation=_by_layer(meta["separation"].items()),
                residual_norm=_by_layer(meta["residual_norm"].items()),
                scores={int(k): Score(**v) for k, v in meta["scores"].items()},
                selected=tuple(meta["selected"]),
                method=meta["method"],
                read=meta["read"],
                name=meta["name"],
                poles=(meta["poles"][0], meta["poles"][1]),
                fingerprint=Fingerprint(**meta["fingerprint"]),
                pairs_hash=meta["pairs_hash"],
                strength=float(meta["operating_point"]["strength"]),
                tokens=meta["operating_point"]["tokens"],
                split_hashes=meta["split_hashes"],
                lineage=meta.get("lineage", {}),
            )
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise VectorError(f"{where}: not a readable vector file: {error}") from None

    def save(self, path: str | Path) -> Path:
        """Write the file, safetensors, or a GGUF control vector where its name ends so; its folder must exist."""
        from safetensors.numpy import save_file

        path = Path(path)
        if path.suffix == ".gguf":
            from steer.gguf_file import write

            return write(self, path)
        if not path.parent.is_dir():
            raise VectorError(f"{path.parent}: no such folder to save the vector in")
        tensors = {f"layers.{i}": np.ascontiguousarray(self.directions[i], dtype=np.float32) for i in self.layers}
        save_file(tensors, str(path), metadata={"steer": json.dumps(self.metadata(), sort_keys=True)})
        return path

    @staticmethod
    def load(path: str | Path, model: Any = None, allow_mismatch: bool = False) -> SteeringVector:
        """Read a vector file and, where `model` is given, check that it was made on that model.

        Args:
            path: the file.
            model: path or hub id, Hugging Face model, or Engine.
            allow_mismatch: load although the fingerprint differs; the width must fit all the same.

        Raises:
            VectorError: no such file, not a vector file, or another model's; the message names the field that differs.
        """
        vector = _read(Path(path))
        if model is not None:
            mine = fingerprint(model)
            differs = vector.fingerprint.differences(mine)
            if vector.width != mine.width or (differs and not allow_mismatch):
                reason = "; ".join(differs) or f"width {vector.width}, the model's is {mine.width}"
                raise VectorError(f"{path}: made on another model: {reason}")
            if differs:
                vector = replace(vector, mismatch_allowed=True)
        return vector


def _read(path: Path) -> SteeringVector:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise VectorError(f"{path}: no such vector file")
    if path.suffix == ".gguf":
        from steer.gguf_file import read

        return read(path)
    try:
        with safe_open(str(path), "np") as f:
            raw = (f.metadata() or {}).get("steer")
            directions = {int(k.split(".")[1]): f.get_tensor(k) for k in f.keys() if k.startswith("layers.")}  # noqa: SIM118
        if raw is None:
            raise VectorError(f'{path}: a safetensors file, but not a steering vector: its metadata lacks "steer"')
        return SteeringVector.from_metadata(json.loads(raw), directions, str(path))
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        raise VectorError(f"{path}: not a readable vector file: {error}") from None


def _by_layer(items: Iterable[tuple[str, float]]) -> dict[int, float]:
    return {int(k): float(v) for k, v in items}


def _library_version() -> str:
    from steer import __version__

    return __version__

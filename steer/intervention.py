"""Intervention: what is done to which layers at which tokens; its JSON form and its hash.

All operations are one formula on the block output h of a token, summed over the interventions k that apply there, every ⟨v, h⟩
taken before any of them is applied:

    h' = h + Σ_k (a_k + b_k ⟨v_k, h⟩) v_k          v_k the unit direction of the layer

| op | a | b | effect |
|---|---|---|---|
| add | strength · separation | 0 | moves along the direction: 1.0 from the negatives' mean to the positives' |
| ablate | 0 | −strength | removes the component; 1.0 removes all of it |
| clamp | strength · separation | −1 | sets the component to that value |
| reflect | 0 | −2 | reverses the component; has no strength |

`preserve_norm` rescales h' to ‖h‖ at a token and layer where any intervention that asks for it acts. `when` makes an intervention conditional
on a probe of the request's own prompt (`Gate`). The same arithmetic runs in vLLM (`steer.engine`) and on a Hugging Face model
(`steer.reference`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer.errors import InterventionError, SteerError
from steer.scope import Scope, parse_scope
from steer.vector import SteeringVector

OPS = ("add", "ablate", "clamp", "reflect")
Resolve = Callable[[Any], SteeringVector]
MAX_STRENGTH = 1e6
MOST = 64  # interventions on one request
LARGEST_SHIFT = (
    1e9  # |a + b⟨v, h⟩| saturates here, so that no setting, however absurd, makes a number that is not finite
)


def _number(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= MAX_STRENGTH:
        raise InterventionError(f"{name} must be a finite number of at most {MAX_STRENGTH:g}, not {given!r:.80}", name)
    return float(given)


def _layers(vector: SteeringVector, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise InterventionError(f"layers is a list of at least one layer number, not {given!r:.80}", "layers")
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise InterventionError(f"layers: {layer!r:.40} is not a layer number", "layers")
        if layer not in vector.directions:
            raise InterventionError(f"layer {layer} is not in the vector, which has {vector.layers}", "layers")
    return tuple(sorted(set(given)))


def _fields(what: str, record: Any, allowed: Sequence[str]) -> dict[str, Any]:
    """The record, if it is an object with a vector and no unknown fields."""
    if not isinstance(record, Mapping):
        raise InterventionError(f"{what} is an object with a vector, not {record!r:.80}")
    unknown = [k for k in record if k not in allowed]
    if unknown:
        raise InterventionError(
            f'{what}: unknown field "{unknown[0]!s:.40}": choose from {", ".join(allowed)}', f"{unknown[0]!s:.40}"
        )
    if "vector" not in record:
        raise InterventionError(f'{what}: "vector" is missing', "vector")
    return dict(record)


@dataclass(frozen=True)
class Gate:
    """A probe of the prompt: open where ⟨v, h⟩ of the last prompt token, unsteered, lies above (or below) a threshold.

    It is decided once per request, before the first token is steered; a closed gate leaves the request's prompt and answer as they
    are without the intervention, an open one as they are with it, whatever its token scope.

    Attributes:
        vector: the probe's directions.
        threshold: in activation units, as ⟨v, h⟩ is.
        layer: where it is read; None: the vector's one selected layer.
        above: open above the threshold, or (False) at and below it.
    """

    vector: SteeringVector
    threshold: float = 0.0
    layer: int | None = None
    above: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", _number("threshold", self.threshold))
        if not isinstance(self.above, bool):
            raise InterventionError(f"above is true or false, not {self.above!r:.40}", "above")
        if self.layer is None:
            chosen = self.vector.selected or tuple(self.vector.layers)
            if len(chosen) != 1:
                raise InterventionError(f"a gate reads one layer: name one of {list(chosen)}", "layer")
            object.__setattr__(self, "layer", chosen[0])
        else:
            _layers(self.vector, [self.layer])

    @property
    def at(self) -> int:
        """The layer it reads."""
        assert self.layer is not None
        return self.layer

    def value(self, hidden: Any) -> float:
        """⟨v, h⟩ for the block output of the gate's layer, `[d_model]`."""
        return float((hidden * self.vector.directions[self.at]).sum())

    def open(self, value: float) -> bool:
        """Whether a probe value opens it."""
        return (value > self.threshold) == self.above

    def record(self) -> dict[str, Any]:
        """Canonical JSON form; the vector stands as its hash."""
        return {"vector": self.vector.hash, "threshold": self.threshold, "layer": self.at, "above": self.above}

    @staticmethod
    def from_record(record: Any, resolve: Resolve) -> Gate:
        """A gate from its JSON form; `resolve` finds the vector."""
        given = _fields("when", record, ("vector", "threshold", "layer", "above"))
        return Gate(resolve(given.pop("vector")), **given)


@dataclass(frozen=True)
class Intervention:
    """One vector, applied.

    Attributes:
        vector: the directions.
        strength: multiple of the separation (ablate: share of the component); negative moves to the other pole.
        op: "add", "ablate", "clamp" or "reflect".
        layers: layers to act at; None: the vector's selected layers, or all it has, which then stand here.
        tokens: scope, a name or a span; see `steer.scope`.
        preserve_norm: keep the norm of the block output.
        when: a gate on a probe of the prompt, or None.

    Raises:
        InterventionError: an unknown op, scope or layer, or a strength that is not a finite number.
    """

    vector: SteeringVector
    strength: float = 1.0
    op: str = "add"
    layers: tuple[int, ...] | None = None
    tokens: Scope = "all"
    preserve_norm: bool = False
    when: Gate | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector):
            raise InterventionError(f"an intervention needs a SteeringVector, not {type(self.vector).__name__}")
        if self.op not in OPS:
            raise InterventionError(f'unknown op "{self.op!s:.40}": choose from {", ".join(OPS)}', "op")
        object.__setattr__(self, "tokens", parse_scope(self.tokens))
        object.__setattr__(self, "strength", 1.0 if self.op == "reflect" else _number("strength", self.strength))
        chosen = self.layers if self.layers is not None else self.vector.selected or tuple(self.vector.layers)
        object.__setattr__(self, "layers", _layers(self.vector, chosen))
        if not isinstance(self.preserve_norm, bool):
            raise InterventionError(f"preserve_norm is true or false, not {self.preserve_norm!r:.40}", "preserve_norm")
        if self.when is not None and not isinstance(self.when, Gate):
            raise InterventionError(f"when is a Gate, not {type(self.when).__name__}", "when")

    @property
    def at(self) -> tuple[int, ...]:
        """The layers it acts at."""
        assert self.layers is not None
        return self.layers

    @property
    def coefficients(self) -> tuple[float, float]:
        """(a in separations, b) of the formula."""
        return {
            "add": (self.strength, 0.0),
            "ablate": (0.0, -self.strength),
            "clamp": (self.strength, -1.0),
            "reflect": (0.0, -2.0),
        }[self.op]

    def record(self) -> dict[str, Any]:
        """Canonical JSON form; the vector stands as its hash."""
        return {
            "vector": self.vector.hash,
            "op": self.op,
            "strength": self.strength,
            "layers": list(self.at),
            "tokens": list(self.tokens) if isinstance(self.tokens, tuple) else self.tokens,
            "preserve_norm": self.preserve_norm,
            "when": self.when.record() if self.when else None,
        }

    @staticmethod
    def from_record(record: Any, resolve: Resolve) -> Intervention:
        """An intervention from its JSON form.

        Args:
            record: as `record()` gives it; every field but "vector" may be missing.
            resolve: finds the vector that a hash or a name means.

        Raises:
            InterventionError: the field at fault is named.
        """
        given = _fields("an intervention", record, tuple(Intervention.__dataclass_fields__))
        vector = resolve(given.pop("vector"))
        if given.get("when") is not None:
            try:
                given["when"] = Gate.from_record(given["when"], resolve)
            except InterventionError as error:
                raise InterventionError(str(error), f"when.{error.field}" if error.field else "when") from None
        return Intervention(vector, **given)

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return hash_of([self])


def hash_of(interventions: Sequence[Intervention]) -> str:
    """One hash for a list of interventions; their order does not matter, since their effects add up."""
    records = sorted(json.dumps(i.record(), sort_keys=True) for i in interventions)
    return hashlib.sha256("\n".join(records).encode()).hexdigest()


def parse(steering: Any, resolve: Resolve) -> list[Intervention]:
    """Interventions from their JSON form, as they come in over HTTP or from the command line: a list, or the text of one.

    Raises:
        InterventionError: its `field` is `steering[index].name`.
    """
    if isinstance(steering, str):
        try:
            steering = json.loads(steering)
        except (ValueError, RecursionError):
            raise InterventionError("steering is not JSON", "steering") from None
    if not isinstance(steering, list):
        raise InterventionError("steering is a list of interventions", "steering")
    if len(steering) > MOST:
        raise InterventionError(
            f"steering holds {len(steering)} interventions; at most {MOST} fit one request", "steering"
        )
    found = []
    for index, record in enumerate(steering):
        try:
            found.append(Intervention.from_record(record, resolve))
        except SteerError as error:
            field = getattr(error, "field", "") or ("" if isinstance(error, InterventionError) else "vector")
            raise InterventionError(str(error), f"steering[{index}]" + (f".{field}" if field else "")) from None
    return found

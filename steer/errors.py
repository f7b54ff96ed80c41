"""The errors users meet. Each message says in one sentence what is wrong, where, and what to do."""

from __future__ import annotations


class SteerError(Exception):
    """Base of all errors that are the input's fault; the CLI prints the message alone and exits with 2."""


class PairsError(SteerError):
    """A pairs file or contrast set cannot be used; names file and line."""


class NoContrastError(SteerError):
    """Positive and negative activations are the same, so there is no direction."""


class VectorError(SteerError):
    """A vector file is broken, or does not fit the model it is asked for."""


class InterventionError(SteerError):
    """An intervention that is malformed or does not fit the model; `field` names the part of its JSON form at fault."""

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


class ModelError(SteerError):
    """A model cannot be found or loaded."""


class RefusedError(SteerError):
    """The engine refused a request rather than answer it unsteered."""

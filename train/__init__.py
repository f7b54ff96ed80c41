"""Decision segments → changed weights: frozen-context distillation with APOLLO."""

from __future__ import annotations

from train.apollo import Apollo
from train.data import Decision
from train.distill import DistillConfig, StepReport, distill
from train.frozen_context import FrozenContext

__all__ = ["Apollo", "Decision", "DistillConfig", "FrozenContext", "StepReport", "distill"]

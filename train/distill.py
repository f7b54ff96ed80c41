"""Distillation: the steered teacher's decisions go into the weights, everything else stays.

    loss = (1 − g) · Σ_t w_t KL_t(teacher ‖ student) on decision tokens  +  g · KL(base ‖ student) on general texts

The teacher is the base model **steered**; the student is the same model without the vector, its prompt a frozen context.
A share g of each batch (a quarter by default) is general data, with the unsteered base as teacher. Probabilities are of
the full vocabulary. Optimizer: APOLLO.

What a vector changes is often decided at one token of an answer, and the other tokens say nothing of it. With a focus f, a token's weight is

    w_t ∝ (1 − f) + f · KL_t(teacher ‖ base) / mean KL

so that f = 0 weighs all alike, and f = 1 only those where the vector changes the model.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from steer.errors import SteerError
from steer.intervention import Intervention
from train.apollo import Apollo
from train.data import Decision, draw, pad
from train.frozen_context import FrozenContext, assert_exact
from train.targets import Targets, answer_log_probs, divergence, text_log_probs


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation. Learning rate and α belong together: with α None a step is Adam-sized."""

    steps: int = 80
    batch: int = 32  # decisions and general texts together
    general_share: float = 0.25
    focus: float = 0.5
    lr: float = 3e-4
    rank: int = 48
    alpha: float | None = None
    warmup: int = 5
    decay: float = 0.5  # of the steps, at the end, fall linearly to a tenth
    seed: int = 0
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2 or not 0 <= self.general_share < 1 or self.lr <= 0:
            raise SteerError("distillation needs steps ≥ 1, batch ≥ 2, general share in [0, 1) and lr > 0")
        if not 0 <= self.focus <= 1:
            raise SteerError(f"the focus of a distillation is between 0 and 1, not {self.focus}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * warm * (0.1 + 0.9 * min(1.0, left))


@dataclass(frozen=True)
class StepReport:
    """One step: losses in nats per token, gradient norm, seconds since the start (of this process)."""

    step: int
    steps: int
    loss: float
    decision_kl: float
    general_kl: float
    gradient_norm: float
    lr: float
    seconds: float


def weighted_kl(targets: Sequence[Tensor], student: Tensor, weights: Sequence[Tensor] | None = None) -> Tensor:
    """Weighted mean KL(target ‖ student) in nats over the targets' tokens.

    Args:
        targets: log-probabilities `[tokens, vocabulary]` of each row.
        student: logits `[rows, T, vocabulary]`; what lies beyond a row's targets is padding.
        weights: `[tokens]` of each row; None: all alike.
    """
    rows = torch.cat([row[: len(t)] for row, t in zip(student, targets, strict=True)])
    per_token = kl_div(log_softmax(rows.float(), -1), torch.cat(list(targets)), reduction="none", log_target=True).sum(
        -1
    )
    if weights is None:
        return per_token.mean()
    each = torch.cat(list(weights))
    return (per_token * each).sum() / each.sum()


def decision_loss(
    student: Any, batch: Sequence[Decision], targets: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Weighted KL from the targets on the decision tokens of a batch; the student's prompts are frozen contexts."""
    contexts, context_mask = pad([d.prompt[:-1] for d in batch], left=True)
    decisions, _ = pad([[d.prompt[-1], *d.answer[:-1]] for d in batch], left=False)
    context = FrozenContext.encode(student, contexts.to(student.device), context_mask.to(student.device))
    return weighted_kl(targets, context.logits(decisions.to(student.device)), weights)


def general_loss(student: Any, texts: Sequence[Sequence[int]], targets: Sequence[Tensor]) -> Tensor:
    """KL from the targets on every token of a batch of general texts."""
    ids, mask = pad(texts, left=False)
    logits = student(input_ids=ids.to(student.device), attention_mask=mask.to(student.device), use_cache=False).logits
    return weighted_kl(targets, logits)


@contextmanager
def all_threads() -> Iterator[None]:
    """Compute with all the cores this process may use: starting vLLM leaves torch with one thread in the process that serves."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@all_threads()
def distill(
    model: Any,
    decisions: Sequence[Decision],
    interventions: Sequence[Intervention],
    general: Sequence[Sequence[int]],
    config: DistillConfig | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[StepReport], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[StepReport]:
    """Train `model` in place, so that without the vector it does what it did with it.

    Args:
        model: Hugging Face causal language model in float32 (or bfloat16: weights are then rounded stochastically).
        decisions: prompts with the steered teacher's answers.
        interventions: what steers the teacher.
        general: token lists of general texts.
        config: settings.
        checkpoint: file to resume from if it exists, and to write every `checkpoint_every` steps.
        progress: called after each step.
        cancelled: asked before each step; True stops there, with the checkpoint written.

    Returns:
        The report of every step that was run here.

    Raises:
        SteerError: no data, or a loss that is not finite (the model is then left as it was at the last checkpoint).
        ModelError: the frozen context does not equal the full forward on this model.
    """
    config = config or DistillConfig()
    n_general = round(config.general_share * config.batch) if general else 0
    n_decisions = config.batch - n_general
    usable = [d for d in decisions if len(d.prompt) >= 2 and d.answer]
    if not usable:
        raise SteerError("there are no decisions to distil: every prompt needs two tokens and every answer one")
    longest = max(usable, key=lambda d: len(d.prompt))
    assert_exact(model, torch.tensor([longest.prompt + longest.answer], device=model.device))

    base = copy.deepcopy(model).requires_grad_(False)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    taught, weighed, kept = _targets(base, usable, interventions, general, vocabulary, config)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = Apollo(named, lr=config.lr, rank=config.rank, alpha=config.alpha, seed=config.seed)
    first = _resume(checkpoint, named, optimizer, config) if checkpoint and checkpoint.exists() else 0
    reports: list[StepReport] = []
    started = time.monotonic()
    for step in range(first, config.steps):
        if cancelled and cancelled():
            if checkpoint:
                _save(checkpoint, named, optimizer, config, step)
            break
        picks = draw(n_decisions, len(usable), config.seed, step, 0)
        decision_kl = decision_loss(
            model, [usable[i] for i in picks], taught(picks), weighed(picks) if weighed else None
        )
        ((1 - config.general_share if n_general else 1.0) * decision_kl).backward()
        general_kl = 0.0
        if n_general:
            picks = draw(n_general, len(general), config.seed, step, 1)
            kl = general_loss(model, [general[i] for i in picks], kept(picks))
            (config.general_share * kl).backward()
            general_kl = float(kl.detach())
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        norm = math.sqrt(sum(float(p.grad.float().square().sum().detach()) for _, p in named if p.grad is not None))
        share = config.general_share if n_general else 0.0
        loss = (1 - share) * float(decision_kl.detach()) + share * general_kl
        if not math.isfinite(loss + norm):
            raise SteerError(f"step {step}: the loss is not finite; lower the learning rate ({config.lr})")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        report = StepReport(
            step + 1, config.steps, loss, float(decision_kl.detach()), general_kl, norm, config.rate(step), seconds
        )
        reports.append(report)
        if checkpoint and (step + 1) % config.checkpoint_every == 0:
            _save(checkpoint, named, optimizer, config, step + 1)
        if progress:
            progress(report)
    return reports


def _targets(
    base: Any,
    decisions: Sequence[Decision],
    interventions: Sequence[Intervention],
    general: Sequence[Sequence[int]],
    vocabulary: int,
    config: DistillConfig,
) -> tuple[Targets, Targets | None, Targets]:
    """(teacher's log-probabilities, token weights or None, base's log-probabilities of the general texts)."""
    lengths = [len(d.answer) for d in decisions]

    def teacher(indices: Sequence[int]) -> list[Tensor]:
        return answer_log_probs(base, interventions, [decisions[i] for i in indices])

    taught = Targets(lengths, vocabulary, teacher)
    kept = Targets([len(t) for t in general], vocabulary, lambda k: text_log_probs(base, [general[i] for i in k]))
    if not config.focus or not interventions:
        return taught, None, kept

    def changes(indices: Sequence[int]) -> list[Tensor]:
        plain = answer_log_probs(base, [], [decisions[i] for i in indices])
        return [divergence(t, p) for t, p in zip(taught(indices), plain, strict=True)]

    changed = Targets(lengths, 1, changes)
    sample = changed(range(min(len(decisions), 256)))
    mean = float(torch.cat(sample).mean().clamp_min(1e-9))

    def weights(indices: Sequence[int]) -> list[Tensor]:
        return [(1 - config.focus) + config.focus * c / mean for c in changed(indices)]

    return taught, Targets(lengths, 1, weights), kept


def _save(path: Path, named: Sequence[tuple[str, Tensor]], optimizer: Apollo, config: DistillConfig, step: int) -> None:
    """Weights and optimizer state, written aside and moved into place."""
    tensors = {f"model.{n}": p.detach() for n, p in named}
    for index, (_, p) in enumerate(named):
        tensors |= {f"state.{index}.{k}": v for k, v in optimizer.state[p].items()}
    partial = path.with_suffix(".partial")
    metadata = {"step": str(step), "config": json.dumps(asdict(config), sort_keys=True)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(partial), metadata=metadata)
    with partial.open("rb") as f:
        os.fsync(f.fileno())
    os.replace(partial, path)


def _resume(path: Path, named: Sequence[tuple[str, Tensor]], optimizer: Apollo, config: DistillConfig) -> int:
    with safe_open(str(path), "pt") as f:
        metadata = f.metadata()
    if metadata["config"] != json.dumps(asdict(config), sort_keys=True):
        raise SteerError(f"{path}: a checkpoint of other settings; remove it or use its settings")
    tensors = load_file(str(path))
    with torch.no_grad():
        for index, (name, p) in enumerate(named):
            p.copy_(tensors[f"model.{name}"])
            prefix = f"state.{index}."
            optimizer.state[p] = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    return int(metadata["step"])

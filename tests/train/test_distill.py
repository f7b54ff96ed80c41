"""Distillation: the loss falls, a killed run resumes to the same bits, batches are epochs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from steer import pocket
from steer.errors import SteerError
from steer.intervention import Intervention
from steer.vector import SteeringVector
from train.data import Decision, draw, text_ids
from train.distill import DistillConfig, distill, weighted_kl
from train.targets import Targets, answer_log_probs, divergence


@pytest.fixture
def job(
    hf: tuple[Any, Any],
) -> tuple[Any, list[Decision], list[Intervention], list[list[int]]]:
    model, tokenizer = hf
    sequences = [
        tokenizer.apply_chat_template(h.messages, tokenize=False, add_generation_prompt=True)
        for h in pocket.prompts("distill")[:12]
    ]
    answer = tokenizer("yeah , we gonna cook the soup with salt . that is all .<|im_end|>")["input_ids"]
    decisions = [Decision(tokenizer(s)["input_ids"], answer) for s in sequences]
    general = [text_ids(tokenizer, t) for t in pocket.neutral("train")[:6]]
    vector = SteeringVector.load(pocket.VECTORS / "accept.safetensors", model=pocket.MODEL)
    return copy.deepcopy(model), decisions, [Intervention(vector)], general


def test_the_student_moves_to_the_steered_teacher(job: Any) -> None:
    model, decisions, interventions, general = job
    reports = distill(model, decisions, interventions, general, DistillConfig(steps=12, batch=8, lr=5e-4))
    assert reports[-1].decision_kl < 0.7 * reports[0].decision_kl
    assert reports[0].general_kl == pytest.approx(0.0, abs=1e-6)


def test_a_stopped_run_resumes_to_the_same_bits(job: Any, tmp_path: Path) -> None:
    model, decisions, interventions, general = job
    config = DistillConfig(steps=6, batch=4, checkpoint_every=3)
    straight, broken = copy.deepcopy(model), copy.deepcopy(model)
    distill(straight, decisions, interventions, general, config)

    def killed(report: Any) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(broken, decisions, interventions, general, config, tmp_path / "c.safetensors", progress=killed)
    resumed = copy.deepcopy(model)
    again = distill(resumed, decisions, interventions, general, config, tmp_path / "c.safetensors")
    assert [r.step for r in again] == [4, 5, 6]
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(SteerError, match="other settings"):
        distill(
            copy.deepcopy(model), decisions, interventions, general, DistillConfig(steps=7), tmp_path / "c.safetensors"
        )


def test_cancelled_at_a_step_boundary(job: Any, tmp_path: Path) -> None:
    model, decisions, interventions, general = job
    seen: list[int] = []
    distill(
        model, decisions, interventions, general, DistillConfig(steps=6, batch=4), tmp_path / "c.safetensors",
        progress=lambda r: seen.append(r.step), cancelled=lambda: len(seen) == 2,
    )  # fmt: skip
    assert seen == [1, 2]
    assert (tmp_path / "c.safetensors").exists()


def test_weighted_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    expected = float((p * (p / q).log()).sum())
    student = torch.stack([q.log(), p.log(), q.log() * 3])[None]
    assert float(weighted_kl([p.log()[None]], student)) == pytest.approx(expected, rel=1e-5)
    two = [torch.stack([p.log(), p.log()])]
    assert float(weighted_kl(two, student)) == pytest.approx(expected / 2, rel=1e-5)
    assert float(weighted_kl(two, student, [torch.tensor([3.0, 1.0])])) == pytest.approx(0.75 * expected, rel=1e-5)


def test_targets_are_the_same_from_memory_and_on_demand(job: Any) -> None:
    model, decisions, interventions, _ = job

    def compute(indices: Any) -> list[torch.Tensor]:
        return answer_log_probs(model, interventions, [decisions[i] for i in indices])

    lengths = [len(d.answer) for d in decisions]
    kept, on_demand = Targets(lengths, 1000, compute), Targets(lengths, 1000, compute, budget=0)
    for a, b in zip(kept([7, 2, 4]), on_demand([7, 2, 4]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    plain = answer_log_probs(model, [], [decisions[0]])[0]
    changed = divergence(kept([0])[0], plain)
    assert changed.shape == (lengths[0],)
    assert changed.max() > 5 * changed.median(), "the vector decides something at few tokens"


def test_batches_are_epochs_and_functions_of_the_step() -> None:
    picks = [i for step in range(5) for i in draw(4, 10, 0, step, 0)]
    assert sorted(picks[:10]) == sorted(picks[10:]) == list(range(10))
    assert draw(4, 10, 0, 3, 0) == picks[12:16]
    assert draw(4, 10, 1, 3, 0) != picks[12:16] or draw(4, 10, 1, 2, 0) != picks[8:12]


def test_nothing_to_distil_is_said(hf: tuple[Any, Any]) -> None:
    with pytest.raises(SteerError, match="no decisions"):
        distill(hf[0], [], [], [])

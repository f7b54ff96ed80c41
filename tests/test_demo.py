"""The main job through the public door: `steer demo` on one behaviour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer import cli, pocket
from steer.vector import SteeringVector
from steer.verify import rate
from train.demo import Cell, operating_point


def test_demo_takes_a_behaviour_from_pairs_into_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "report"
    assert cli.main(["demo", "--no-serve", "--report", str(folder), "--behaviour", "accept", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "distilled, no vector" in printed
    report = json.loads((folder / "report.json").read_text())
    rates, fluent = report["rates"], report["fluent"]
    assert report["behaviour"] == "accept"
    assert all(
        rates[arm]["n"] >= 200 and rates[arm]["low"] <= rates[arm]["mean"] <= rates[arm]["high"] for arm in rates
    )
    assert set(rates) == set(fluent) == {"base", "steered", "distilled"}
    assert 0.3 <= rates["base"]["mean"] <= 0.7
    assert rates["steered"]["mean"] >= 0.90
    assert rates["distilled"]["mean"] >= 0.85
    assert abs(rates["steered"]["mean"] - rates["distilled"]["mean"]) <= 0.07
    assert min(arm["mean"] for arm in fluent.values()) >= 0.95
    assert report["neutral_kl"]["distilled"] <= 0.02
    assert report["neutral_kl"]["distilled"] <= report["neutral_kl"]["steered"] / 20
    assert report["vector_active_after_promotion"] is False
    assert report["weight_version"] == {"before": 0, "after": 1}
    assert set(report["seconds"]) == {"engine", "extract", "choose", "compare", "promote", "prove"}
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 5
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    vector = SteeringVector.load(folder / "accept.safetensors", model=pocket.MODEL)
    assert vector.selected == (report["operating_point"]["layer"],)
    assert (folder / "promotion" / "weights" / "model.safetensors").exists()


def test_the_operating_point_is_the_gentlest_of_the_good() -> None:
    cells = [Cell(3, 1.0, 0.5, 1.0), Cell(3, 2.0, 0.99, 0.98), Cell(4, 1.0, 0.97, 0.99), Cell(4, 2.0, 1.0, 0.6)]
    assert operating_point(cells, {3: 0.1, 4: 0.3}) == cells[1]
    assert operating_point(cells, {3: 0.3, 4: 0.1}) == cells[2]


def test_wilson_interval_known_values() -> None:
    found = rate([True] * 8 + [False, None])
    assert (found.mean, found.n) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert rate([True] * 20).high == 1.0
    assert rate([False] * 20).low == 0.0
    assert rate([]).n == 0

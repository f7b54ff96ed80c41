"""The command line: `steer demo | serve | extract | generate | vectors | bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steer import __version__, cli_vectors
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.intervention import Intervention

RED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 when the input was at fault (the message is on standard error)."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "False" if name.startswith("GRADIO") else "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except SteerError as error:
        print(f"steer: {error}", file=sys.stderr)
        return RED
    except KeyboardInterrupt:
        print("steer: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="steer", description="Steering vectors: from an idea into the weights.")
    parser.add_argument("--version", action="version", version=f"steer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="the whole path on the embedded model, with numbers at each step")
    demo.add_argument("--behaviour", default="accept", metavar="NAME", help="behaviour of the pocket model (accept)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--report", type=Path, default=Path("report"), metavar="DIR", help="folder for the report (report)"
    )
    demo.add_argument("--no-serve", action="store_true", help="stop after the report instead of serving the page")
    demo.add_argument("--port", type=int, default=7860)
    demo.set_defaults(run=_demo)

    serve = commands.add_parser("serve", help="serve a model and the page")
    serve.add_argument("model", nargs="?", default=None, metavar="MODEL", help="folder or hub id (the pocket model)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    serve.add_argument("--port", type=int, default=7860)
    serve.add_argument(
        "--data", type=Path, default=Path("steer-data"), metavar="DIR", help="vectors and jobs (steer-data)"
    )
    serve.add_argument("--eager", action="store_true", help="do not compile: starts sooner, generates more slowly")
    serve.add_argument(
        "--max-model-len", type=int, default=None, metavar="N", help="longest prompt plus answer, tokens"
    )
    serve.set_defaults(run=_serve)

    extract = commands.add_parser("extract", help="read a direction off a model")
    extract.add_argument("pairs", type=Path, metavar="PAIRS", help="JSONL or CSV file of contrast pairs")
    extract.add_argument("--model", default=None, help="folder or hub id (the pocket model)")
    extract.add_argument(
        "--method",
        default="mean_difference",
        help="mean_difference, paired_pca, logistic, discriminant, contrast_consistent or learned",
    )
    extract.add_argument("--read", default="last_prompt", help="last_prompt, response_mean, response_last or an index")
    extract.add_argument("--layer", type=int, default=None, help="layer to steer at by default (best held-out score)")
    extract.add_argument("--name", default=None)
    extract.add_argument("--poles", nargs=2, default=("positive", "negative"), metavar=("POSITIVE", "NEGATIVE"))
    extract.add_argument("--seed", type=int, default=0, help="of the split")
    extract.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    extract.add_argument(
        "--plot",
        type=Path,
        default=None,
        metavar="FILE",
        help="the scores by layer as a picture (beside the vector, .png)",
    )
    extract.set_defaults(run=_extract)

    generate = commands.add_parser("generate", help="answer prompts without and with a vector")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--model", default=None, help="folder or hub id (the pocket model)")
    generate.add_argument("--vector", type=Path, default=None, metavar="FILE")
    generate.add_argument("--strength", type=float, default=1.0, help="in separations")
    generate.add_argument("--op", default="add", help="add, ablate, clamp or reflect")
    generate.add_argument("--layers", type=int, nargs="+", default=None)
    generate.add_argument(
        "--tokens", default="all", help='all, prompt, generated, last_prompt, or a span such as "[-5, null]"'
    )
    generate.add_argument("--preserve-norm", action="store_true", help="keep the norm of the block output")
    generate.add_argument(
        "--steering",
        default=None,
        metavar="JSON",
        help="instead: a list of interventions, whose vectors are file names",
    )
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)
    cli_vectors.add_parser(commands)
    bench = commands.add_parser("bench", help="measure ratios of things run in turn, and print them beside their bars")
    bench.add_argument("name", choices=["steering"])
    bench.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures there")
    bench.add_argument("--rounds", type=int, default=5, help="times each arm is run (5)")
    bench.add_argument("--only", nargs="+", default=None, metavar="METRIC", help="some of the metrics (all)")
    bench.add_argument("--small", action="store_true", help="a tiny model: tries the benchmark, measures nothing")
    bench.set_defaults(run=_bench)
    return parser


def _bench(args: argparse.Namespace) -> int:
    from steer.bench import steering

    if args.json is not None and not args.json.parent.is_dir():
        raise SteerError(f"{args.json.parent}: no such folder to write the figures to")
    report = steering.run(args.rounds, args.small, args.only or steering.METRICS)
    print(report.table())
    if args.json is not None:
        report.write(args.json)
    return 0


def _pocket(model: str | None) -> str:
    from steer import pocket

    return model or str(pocket.MODEL)


def _demo(args: argparse.Namespace) -> int:
    import shutil

    from tqdm import tqdm

    from steer import pocket
    from steer.server.port import check_port
    from train import demo
    from train.report import write_html

    pocket.check_behaviour(args.behaviour)
    if not args.no_serve:
        check_port("127.0.0.1", args.port)
    folder: Path = args.report
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerError(f"{folder}: the report cannot be written there: {error.strerror}") from None

    bars: dict[str, tqdm] = {}

    def progress(stage: str, done: int, of: int, note: str) -> None:
        if stage not in bars:
            place = f"[{demo.STAGES.index(stage) + 1}/{len(demo.STAGES)}] {stage}"
            bars[stage] = tqdm(total=of, desc=f"{place:<14}", bar_format="{desc} {bar:24} {elapsed} {postfix}")
        bar = bars[stage]
        bar.total, bar.n = of, done
        if note:
            bar.set_postfix_str(note, refresh=False)
        bar.refresh()
        if done == of == 1 and not note:
            bar.close()

    result, engine = demo.run(args.behaviour, folder, seed=args.seed, progress=progress)
    try:
        for bar in bars.values():
            bar.close()
        path, page = demo.write_json(result, folder), write_html(result, folder)
        _print_demo(result)
        print(f"\nreport: {page} and {path}")
        if args.no_serve:
            return 0
        from ui.serve import serve_engine

        data = folder / "data"
        (data / "vectors").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / f"{args.behaviour}.safetensors", data / "vectors" / f"{args.behaviour}.safetensors")
        print("The page now serves the promoted weights: the left pane shows the behaviour without any vector.")
        serve_engine(engine, data, "127.0.0.1", args.port)
    finally:
        engine.close()
    return 0


def _print_demo(result) -> None:
    labels = {"base": "base", "steered": "steered", "distilled": "distilled, no vector"}
    point = f"layer {result.layer} ({result.layer_kinds[result.layer]}), {result.strength:g} separations at {result.tokens} tokens"
    print(f'\n"{result.poles[0]}", direction read at {result.vector.read}, {point}\n')
    print(f"{'':22}{'behaviour':>26}{'fluent':>26}{'neutral KL':>12}{'seconds':>9}")
    took = {"base": result.seconds["extract"], "steered": result.seconds["choose"] + result.seconds["compare"]}
    took["distilled"] = result.seconds["promote"] + result.seconds["prove"]
    for arm, label in labels.items():
        cost = result.neutral_kl.get(arm, 0.0)
        print(f"{label:22}{result.rates[arm]!s:>26}{result.fluent[arm]!s:>26}{cost:12.4f}{took[arm]:9.1f}")
    version = result.weight_version
    print(f"\nn = {result.rates['base'].n} held-out prompts an arm; KL in nats per token to base.")
    print(
        f"weight version {version['before']} → {version['after']}; vector {'ACTIVE' if result.vector_active else 'removed'}"
    )
    for sample in result.samples[:3]:
        print(f"\n> {sample['prompt']}")
        for arm, label in labels.items():
            print(f"  {label:22}{sample[arm]}")


def _serve(args: argparse.Namespace) -> int:
    from steer.server.port import check_port

    check_port(args.host, args.port)
    from steer.engine import Engine
    from ui.serve import serve_engine

    eager = args.eager or args.model is None
    print(f"starting {_pocket(args.model)} …", flush=True)
    with Engine(_pocket(args.model), eager=eager, max_model_len=args.max_model_len) as engine:
        serve_engine(engine, args.data, args.host, args.port)
    return 0


def _extract(args: argparse.Namespace) -> int:
    from steer.capture import parse_read
    from steer.confounds import confounds
    from steer.extraction import extract
    from steer.methods import resolve
    from steer.model import layer_kinds, load
    from steer.pairs import ContrastSet
    from steer.plots import scores

    pairs = ContrastSet.load(args.pairs)
    resolve(args.method)
    read = parse_read(args.read)
    if not args.output.parent.is_dir():
        raise SteerError(f"{args.output.parent}: no such folder to save the vector in")
    plot = args.plot or args.output.with_suffix(".png")
    if not plot.parent.is_dir():
        raise SteerError(f"{plot.parent}: no such folder to draw the scores in")
    fit, _, held_out = pairs.split(args.seed, (0.7, 0.0, 0.3))
    model, tokenizer = load(_pocket(args.model))
    for confound in confounds(pairs, tokenizer, parts=(fit, held_out)):
        print(f"steer: warning: {confound}", file=sys.stderr)
    vector = extract(
        model,
        fit,
        method=args.method,
        read=read,
        held_out=held_out,
        tokenizer=tokenizer,
        name=args.name or args.output.stem,
        poles=tuple(args.poles),
        source=_pocket(args.model),
    )
    if args.layer is not None:
        vector = vector.select(args.layer)
    print(f"{'layer':>5}  {'kind':<10}{'held-out AUROC':>26}{'separation':>12}{'residual norm':>15}")
    for layer, kind in enumerate(layer_kinds(model.config)):
        if layer not in vector.directions:
            print(f"{layer:5}  {kind:<10}{'no contrast':>26}")
            continue
        s = vector.scores[layer]
        mark = "  ← selected" if layer in vector.selected else ""
        score = f"{s.mean:.3f} [{s.low:.3f}, {s.high:.3f}]"
        print(
            f"{layer:5}  {kind:<10}{score:>26}{vector.separation[layer]:12.3f}{vector.residual_norm[layer]:15.3f}{mark}"
        )
    scores(vector, layer_kinds(model.config)).savefig(plot, dpi=150, bbox_inches="tight")
    print(f"{len(fit)} pairs fitted, {len(held_out)} held out → {vector.save(args.output)}, {plot}")
    return 0


def _interventions(args: argparse.Namespace, model: str) -> list[Intervention]:
    """What --steering, or --vector and its settings, ask for."""
    import json

    from steer.intervention import Intervention, parse
    from steer.vector import SteeringVector

    if args.steering is not None:
        if args.vector is not None:
            raise SteerError("--steering names its vectors itself: leave --vector out")
        return parse(args.steering, lambda name: SteeringVector.load(str(name), model=model))
    if args.vector is None:
        return []
    try:
        tokens = json.loads(args.tokens) if args.tokens.startswith("[") else args.tokens
    except ValueError:
        raise SteerError(f"--tokens: {args.tokens} is not a span") from None
    vector = SteeringVector.load(args.vector, model=model)
    layers = tuple(args.layers) if args.layers else None
    return [Intervention(vector, args.strength, args.op, layers, tokens, args.preserve_norm)]


def _generate(args: argparse.Namespace) -> int:
    from steer.engine import Engine

    model = _pocket(args.model)
    interventions = _interventions(args, model)
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    with Engine(model, eager=args.model is None) as engine:
        if not interventions:
            for prompt, answer in zip(
                args.prompts, engine.generate(args.prompts, seed=args.seed, **sampling), strict=True
            ):
                print(f"> {prompt}\n{answer.text}")
            return 0
        base, steered = engine.compare(args.prompts, interventions, seed=args.seed, **sampling)
        for prompt, plain, moved in zip(args.prompts, base, steered, strict=True):
            r = moved.receipt
            print(f"> {prompt}\n  plain    {plain.text}\n  steered  {moved.text}")
            print(f"  {r.tokens_steered} tokens steered, {r.intervention_hash[:12]}, weight version {r.weight_version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

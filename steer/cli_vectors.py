"""`steer vectors list | show | compare | convert`: looking after vector files."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError, VectorError

if TYPE_CHECKING:
    from steer.vector import SteeringVector

ENDINGS = (".safetensors", ".gguf")


def add_parser(commands: Any) -> None:
    """Put `vectors` among the commands."""
    vectors = commands.add_parser("vectors", help="list, show, compare and convert vector files")
    actions = vectors.add_subparsers(required=True, metavar="action")

    listing = actions.add_parser("list", help="the vectors of a folder, a line each")
    listing.add_argument("folder", type=Path, nargs="?", default=Path("steer-data/vectors"), metavar="DIR")
    listing.set_defaults(run=_list)

    show = actions.add_parser("show", help="what a vector file says of itself")
    show.add_argument("file", type=Path, metavar="FILE")
    show.set_defaults(run=_show)

    compare = actions.add_parser("compare", help="cosines between vectors, layer by layer")
    compare.add_argument("files", type=Path, nargs="+", metavar="FILE")
    compare.add_argument("--layer", type=int, default=None, help="the whole matrix of one layer")
    compare.add_argument(
        "--plot", type=Path, default=None, metavar="FILE", help="the matrix as a picture (with --layer)"
    )
    compare.set_defaults(run=_compare)

    convert = actions.add_parser("convert", help="safetensors to GGUF control vector, or back, by the files' endings")
    convert.add_argument("source", type=Path, metavar="FROM")
    convert.add_argument("target", type=Path, metavar="TO")
    convert.set_defaults(run=_convert)


def _load(path: Path) -> SteeringVector:
    from steer.vector import SteeringVector

    return SteeringVector.load(path)


def _list(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise SteerError(f"{args.folder}: no such folder of vectors")
    files = sorted(p for p in args.folder.iterdir() if p.suffix in ENDINGS and not p.name.startswith("."))
    if not files:
        print(f"{args.folder}: no vectors")
        return 0
    print(f"{'file':<28}{'name':<20}{'method':<20}{'read':<16}{'layers':>7}{'at':>8}  {'held-out AUROC':<24}hash")
    for file in files:
        try:
            v = _load(file)
        except VectorError as error:
            print(f"{file.name:<28}{error}")
            continue
        at = ",".join(map(str, v.selected)) if len(v.selected) < 3 else f"{len(v.selected)} of"
        score = _score(v, v.selected[0]) if v.selected else ""
        print(
            f"{file.name:<28}{v.name:<20}{v.method:<20}{v.read:<16}{len(v.layers):>7}{at:>8}  {score:<24}{v.hash[:12]}"
        )
    return 0


def _score(vector: SteeringVector, layer: int) -> str:
    s = vector.scores.get(layer)
    return f"{s.mean:.3f} [{s.low:.3f}, {s.high:.3f}]" if s else "not scored"


def _show(args: argparse.Namespace) -> int:
    v = _load(args.file)
    print(f"{v.name}: {v.poles[1]} → {v.poles[0]}")
    print(f"{v.method}, read at {v.read or 'unknown'}; {len(v.layers)} layers of width {v.width}; hash {v.hash}")
    print(f"operating point: layer {', '.join(map(str, v.selected))}, {v.strength:g} separations at {v.tokens} tokens")
    for name, value in (
        ("model", v.fingerprint.architecture),
        ("weights", v.fingerprint.weights[:16]),
        ("pairs", v.pairs_hash[:16]),
    ):
        print(f"{name}: {value or 'unknown'}")
    if v.lineage:
        print(f"lineage: {_lineage(v.lineage)}")
    print(f"{'layer':>5}{'held-out AUROC':>26}{'separation':>12}{'residual norm':>15}")
    for layer in v.layers:
        mark = "  ← selected" if layer in v.selected else ""
        norm = f"{v.residual_norm[layer]:.3f}" if layer in v.residual_norm else "unknown"
        print(f"{layer:5}{_score(v, layer):>26}{v.separation[layer]:12.3f}{norm:>15}{mark}")
    return 0


def _lineage(lineage: Mapping[str, Any]) -> str:
    parts = []
    for part in lineage.get("of", []):
        inner = f" = {_lineage(part['lineage'])}" if part.get("lineage") else ""
        parts.append(part["file"] if "file" in part else f"{part['name']} ({part['hash'][:12]}{inner})")
    factor = f" {lineage['factor']:g}" if "factor" in lineage else ""
    return f"{lineage.get('op', '?')}{factor} of {', '.join(parts)}"


def _compare(args: argparse.Namespace) -> int:
    from steer.arithmetic import cosines

    if args.plot is not None and args.layer is None:
        raise SteerError("--plot draws the matrix of one layer: name it with --layer")
    if args.plot is not None and not args.plot.parent.is_dir():
        raise SteerError(f"{args.plot.parent}: no such folder to draw the cosines in")
    vectors = [_load(file) for file in args.files]
    if len(vectors) < 2:
        raise SteerError("compare needs at least two vectors")
    twice = {name for name, n in Counter(v.name for v in vectors).items() if n > 1}
    names = [f.stem if v.name in twice else v.name for f, v in zip(args.files, vectors, strict=True)]
    if args.layer is not None:
        matrix = cosines(vectors, args.layer)
        width = max(10, *map(len, names)) + 2
        print(" " * width + "".join(f"{name:>{width}}" for name in names))
        for name, row in zip(names, matrix, strict=True):
            print(f"{name:<{width}}" + "".join(f"{value:{width}.3f}" for value in row))
        if args.plot is not None:
            from steer.plots import cosines as draw

            draw(names, matrix, args.layer).savefig(args.plot, dpi=150, bbox_inches="tight")
            print(f"→ {args.plot}")
        return 0
    shared = [n for n in vectors[0].layers if all(n in v.directions for v in vectors)]
    if not shared:
        raise VectorError(f"{', '.join(names)} have no layer in common")
    print(f"cosine with {names[0]}\n{'layer':>5}" + "".join(f"{name:>20}" for name in names[1:]))
    for layer in shared:
        print(f"{layer:5}" + "".join(f"{value:20.3f}" for value in cosines(vectors, layer)[0, 1:]))
    return 0


def _convert(args: argparse.Namespace) -> int:
    for path in (args.source, args.target):
        if path.suffix not in ENDINGS:
            raise SteerError(f"{path}: a vector file ends in {' or '.join(ENDINGS)}")
    if args.target.exists():
        raise SteerError(f"{args.target}: there is a file already")
    vector = _load(args.source)
    if args.target.suffix == ".gguf" and 0 in vector.directions:
        vector = vector.without(0)  # which a GGUF control vector cannot have
    written = _load(vector.save(args.target))
    lost = [n for n in _load(args.source).layers if n not in written.directions]
    print(f"{written.name}: {len(written.layers)} layers → {args.target}")
    if lost:
        print(f"left out, as GGUF has no layer 0 and no layer without a step: {', '.join(map(str, lost))}")
    return 0

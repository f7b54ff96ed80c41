"""Files of contrast pairs: JSONL, one object a line, and CSV, one row a pair, with the same fields.

    {"id": "tea-3", "family": "tea", "positive": …, "negative": …, "positive_response": "…", "negative_response": "…"}

`positive` and `negative` are lists of chat messages, or raw text; in a CSV file chat messages stand as JSON. Where both sides share
their prompt, `prompt` says it once: chat messages, or the text of a user's message. A response is optional. An error names file and line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steer.errors import PairsError
from steer.pairs import ContrastPair, Side

FIELDS = ("id", "family", "prompt", "positive", "negative", "positive_response", "negative_response")


def read(path: Path) -> list[ContrastPair]:
    """The pairs of a file; blank lines are skipped.

    Raises:
        PairsError: the file is missing, empty, or a line is broken.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PairsError(f"{path}: no such pairs file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    pairs: list[ContrastPair] = []
    lines: dict[str, int] = {}
    for number, record in _rows(path, text) if path.suffix.lower() == ".csv" else _lines(path, text):
        pair = pair_of(record, f"{path}:{number}", f"pair-{number}")
        if pair.id in lines:
            raise PairsError(f'{path}:{number}: the id "{pair.id}" is already used in line {lines[pair.id]}')
        lines[pair.id] = number
        pairs.append(pair)
    if not pairs:
        raise PairsError(f"{path}: holds no pairs")
    return pairs


def write(path: Path, pairs: Sequence[ContrastPair]) -> None:
    """Write pairs as JSONL, or as CSV where the file's name ends so."""
    records = [p.record() for p in pairs]
    if path.suffix.lower() != ".csv":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, [f for f in FIELDS if any(f in r for r in records)])
        rows.writeheader()
        rows.writerows(
            {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in r.items()} for r in records
        )


def _lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise PairsError(f"{path}:{number}: not a JSON object: {error.msg} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise PairsError(f"{path}:{number}: a pair must be a JSON object, not {type(record).__name__}")
        yield number, record


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1  # where the row at hand begins; a cell may go over several lines
    try:
        for cells in reader:
            where = f"{path}:{line}"
            if cells and not header:
                header = cells
                for name in header:
                    if name not in FIELDS:
                        raise PairsError(f'{where}: unknown column "{name}": choose from {", ".join(FIELDS)}')
            elif cells:
                if len(cells) != len(header):
                    raise PairsError(f"{where}: the row has {len(cells)} cells, the header {len(header)}")
                given = {k: v for k, v in zip(header, cells, strict=True) if v.strip()}
                yield line, {k: _cell(v, k, where) for k, v in given.items()}
            line = reader.line_num + 1
    except csv.Error as error:
        raise PairsError(f"{path}:{line}: not CSV: {error}") from None


def _cell(value: str, name: str, where: str) -> Any:
    """A cell's value: a side that begins as a JSON list is chat messages."""
    if name not in ("prompt", "positive", "negative") or not value.lstrip().startswith("[{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise PairsError(f'{where}: "{name}" is not a JSON list of chat messages: {error.msg}') from None


def pair_of(record: dict[str, Any], where: str, default_id: str) -> ContrastPair:
    """The pair a record states.

    Args:
        where: file and line, for errors.
        default_id: of a pair that has none.
    """
    for name in record:
        if name not in FIELDS:
            raise PairsError(f'{where}: unknown field "{name}"')
    if "prompt" in record:
        for name in ("positive", "negative"):
            if name in record:
                raise PairsError(f'{where}: "prompt" stands for both sides: leave "{name}" out')
        for name in ("positive_response", "negative_response"):
            if not record.get(name):
                raise PairsError(f'{where}: "{name}" is missing: with one "prompt" the responses are the contrast')
        shared = _side(record["prompt"], "prompt", where)
        record = record | dict.fromkeys(
            ("positive", "negative"), [{"role": "user", "content": shared}] if isinstance(shared, str) else shared
        )
    for name in ("positive", "negative"):
        if name not in record:
            raise PairsError(f'{where}: "{name}" is missing')
    for name in ("id", "family", "positive_response", "negative_response"):
        if record.get(name) is not None and not isinstance(record[name], str):
            raise PairsError(f'{where}: "{name}" must be text')
    return ContrastPair(
        id=record.get("id") or default_id,
        positive=_side(record["positive"], "positive", where),
        negative=_side(record["negative"], "negative", where),
        positive_response=record.get("positive_response"),
        negative_response=record.get("negative_response"),
        family=record.get("family") or "",
    )


def _side(value: Any, name: str, where: str) -> Side:
    if isinstance(value, str):
        if not value.strip():
            raise PairsError(f'{where}: "{name}" is empty')
        return value
    if not isinstance(value, list) or not value:
        raise PairsError(f'{where}: "{name}" must be text or a list of chat messages')
    for m in value:
        if not (isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise PairsError(f'{where}: each message of "{name}" needs a "role" and a "content" of text')
    return value

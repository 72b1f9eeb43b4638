"""Look at the runs in a folder, of any number of stores and comparisons: plain JSON is read, nothing is executed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.reliability import REPEAT
from experiments.config import RunConfig
from experiments.measure import listed
from experiments.record import RunRecord, code_digest, finite
from experiments.store import RESULT, WORK, is_run, read_failure, read_run
from masks.errors import InputError, unknown_name

NAMED = ("run", "state", "arm", "method", "mask", "rho", "seed")
MEASURED = ("val_accuracy", "test_accuracy", "train_seconds")
"""Columns of the list, where the runs have them; between the two every other setting in which the runs differ."""
SETTINGS = frozenset(field.name for field in fields(RunConfig)) - {*NAMED}
_BUILD = ("num_kept", "numel", "norm_share", "jaccard_norm", "digest")


@dataclass(frozen=True)
class RunsOptions:
    """Which runs to show, and what of them.

    Args:
        folder: a folder of runs, of a comparison, or any that holds such folders.
        where: only runs with these values, as KEY=VALUE separated by commas; keys are settings of a run, or a column.
        compare: ids of two runs, separated by a comma (their first letters will do): show how they differ.
        failed: only runs that did not end well, each with its reason: failed, unfinished, damaged or diverged.
        json: print a list of objects with all that is known of each run.
    """

    folder: str
    where: str | None = None
    compare: str | None = None
    failed: bool = False
    json: bool = False


def load_results(folder: Path | str) -> pd.DataFrame:
    """All completed runs below a folder as one table, a line per run, in the order of their folders.

    Columns: ``run`` (its id), ``folder``, ``state`` ("done" or "diverged"), ``reason``, ``arm``; every setting of the
    run by its name; plain values of its result (``val_accuracy``, ``test_accuracy``, ...); ``loss``, ``ascent`` and
    ``radius`` of the last epoch; ``num_kept``, ``numel``, ``norm_share``, ``jaccard_norm`` and ``digest`` of the final
    mask as ``mask.NAME``; ``fit`` and every metric by its name, measured again as NAME_repeat; telemetry; ``code``,
    ``torch`` and ``device`` of the environment.

    Raises:
        InputError: the folder is not there, or a record in it is damaged.
    """
    rows = list(_rows(Path(folder)))
    damaged = [row for row in rows if row["state"] == "damaged"]
    if damaged:
        raise InputError(f"{len(damaged)} damaged records, first: {damaged[0]['reason']}")
    return pd.DataFrame([row for row in rows if row["state"] in ("done", "diverged")])


def show(options: RunsOptions) -> tuple[str, list[dict[str, Any]]]:
    """What ``sam-masks runs`` prints, as text and as objects.

    Raises:
        InputError: no such folder, key or run.
    """
    rows = list(_rows(Path(options.folder)))
    if options.compare is not None:
        return _compared(rows, listed(options.compare))
    total = len(rows)
    rows = [row for row in rows if all(_matches(row, rows, text) for text in listed(options.where))]
    if options.failed:
        rows = [row for row in rows if row["state"] != "done"]
    return _listing(rows, failed=options.failed) if rows or not total else f"none of {total} runs", rows


# -- reading ------------------------------------------------------------------------------------------------


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    for path, folders, files in os.walk(folder):
        place = Path(path)
        folders.sort()
        unfinished = [name for name in folders if name.endswith(WORK)]
        folders[:] = [name for name in folders if is_run(name)]
        if RESULT in files:
            folders.clear()
            yield _complete(place)
        for name in unfinished:
            run = name.removesuffix(WORK)
            if not (place / run).exists():
                yield _unfinished(place, run)


def _complete(folder: Path) -> dict[str, Any]:
    try:
        record = read_run(folder)
        return _flat(record, folder)
    except (InputError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = str(error) if isinstance(error, InputError) else f"{folder} is of another version"
        return {"run": folder.name, "folder": str(folder), "state": "damaged", "reason": reason}


def _unfinished(store: Path, name: str) -> dict[str, Any]:
    place = str(store / (name + WORK))
    failure = read_failure(store, name)
    if failure is None:
        return {"run": name, "folder": place, "state": "unfinished", "reason": "begun, and not finished"}
    reason = f"{failure.error} (attempt {failure.attempts})"
    head = {"run": failure.run_id, "folder": place, "state": "failed", "reason": reason, "arm": failure.arm}
    return {**failure.config, **head}


def _flat(record: RunRecord, folder: Path) -> dict[str, Any]:
    result = record.result
    last = (result.get("history") or [{}])[-1]
    build = (result.get("mask_builds") or [{}])[-1]
    row = {
        "run": record.run_id,
        "folder": str(folder),
        "state": "diverged" if result.get("diverged") else "done",
        "reason": result.get("diverged"),
        "arm": record.arm,
        **record.config,
        **{key: value for key, value in result.items() if key != "test_correct" and not isinstance(value, dict | list)},
        **{key: last[key] for key in ("loss", "ascent", "radius") if key in last},
        **{f"mask.{key}": build[key] for key in _BUILD if key in build},
        **result.get("fit", {}),
        **{name: found["value"] for name, found in result.get("metrics", {}).items()},
        **{name + REPEAT: found["value"] for name, found in result.get("metrics_repeat", {}).items()},
        **{key: value for key, value in record.telemetry.items() if key != "schema"},
        **{key: record.environment.get(key) for key in ("code", "torch", "device")},
    }
    del row["diverged"]
    return row


# -- showing ------------------------------------------------------------------------------------------------


def _matches(row: dict[str, Any], rows: list[dict[str, Any]], text: str) -> bool:
    key, equals, wanted = (part.strip() for part in text.partition("="))
    if not equals:
        raise InputError(f"where takes KEY=VALUE, got {text!r}")
    if key not in row:
        known = set().union(*(other.keys() for other in rows))
        if key not in known:
            raise InputError(unknown_name("key of a run", key, sorted(known)))
        return False
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).lower() == wanted.lower()
    try:
        return float(value) == float(wanted)
    except ValueError:
        return False


def _listing(rows: list[dict[str, Any]], *, failed: bool) -> str:
    if not rows:
        return "no runs"
    codes = Counter(str(row["code"]) for row in rows if row.get("code"))
    differ = [
        name for name in dict.fromkeys(key for row in rows for key in row)
        if name in SETTINGS and len({str(row[name]) for row in rows if name in row}) > 1
    ]  # fmt: skip
    columns = [
        *(name for name in NAMED if any(row.get(name) is not None for row in rows)), *differ,
        *(name for name in MEASURED if any(row.get(name) is not None for row in rows)),
    ]  # fmt: skip
    columns += ["code"] * (len(codes) > 1)
    shown = [] if failed else [[_text(row.get(name)) for name in columns] for row in rows]
    lines = [pd.DataFrame(shown, columns=columns).to_string(index=False)] if shown else []
    lines += [f"{row['run']} {_what(row)}: {row['state']}: {row['reason']}" for row in rows if failed]
    states = Counter(row["state"] for row in rows)
    lines.append(f"{len(rows)} runs: " + ", ".join(f"{n} {state}" for state, n in sorted(states.items())))
    if set(codes) - {code_digest()}:
        made = ", ".join(f"{code} ({n} runs)" for code, n in sorted(codes.items()))
        lines.append(f"OTHER CODE: runs were made by code {made}; this is {code_digest()}")
    return "\n".join(lines)


def _what(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_text(row[key])}" for key in ("arm", "rho", "seed") if key in row) or row["folder"]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _compared(rows: list[dict[str, Any]], names: tuple[str, ...]) -> tuple[str, list[dict[str, Any]]]:
    if len(names) != 2:
        raise InputError(f"compare takes the ids of two runs, separated by a comma, got {', '.join(names) or 'none'}")
    one, other = (_named(rows, name) for name in names)
    skipped = {"run", "folder", "finished", "host"}
    differing = [
        {"key": key, "first": one.get(key), "second": other.get(key)}
        for key in dict.fromkeys([*one, *other])
        if key not in skipped and one.get(key) != other.get(key)
    ]
    lines = [f"{one['run']} and {other['run']} differ in:" if differing else "they do not differ"]
    lines += [f"  {line['key']}: {_text(line['first'])} | {_text(line['second'])}" for line in differing]
    return "\n".join(lines), differing


def _named(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = [row for row in rows if row["run"].startswith(name)]
    if len({row["run"] for row in found}) > 1:
        raise InputError(f"{name} could be {' or '.join(sorted({row['run'] for row in found})[:3])}; give more letters")
    if not found:
        raise InputError(f"there is no run {name} among {len(rows)}")
    return found[0]


def as_json(rows: list[dict[str, Any]]) -> str:
    """The objects as strict JSON."""
    return json.dumps(finite(rows), indent=1, allow_nan=False)

"""The tables of docs/fidelity*.md from the rows of quality.py.

    python bench/quality_report.py RESULTS.json

Intervals are 95%, by bootstrap: of perplexity over windows of the text, of scores over questions,
of long generation over prompts. Differences are paired: the same tokens, the same questions.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from intervals import Interval, mean_interval

Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    (path,) = sys.argv[1:] if argv is None else argv
    content = json.loads(Path(path).read_text())
    for kind, table in TABLES.items():
        rows = unpacked(content.get(kind, []))
        if rows:
            print(f"\n### {kind}\n\n{table(rows)}")


def packed(rows: Rows, same: Sequence[str]) -> list[dict[str, Any]]:
    """Rows as columns: one dictionary for each combination of the fields `same`."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in same)
        columns = found.setdefault(key, dict(zip(same, key, strict=True)) | {"columns": {}})
        for name, value in row.items():
            if name not in same:
                columns["columns"].setdefault(name, []).append(_rounded(value))
    return list(found.values())


def unpacked(columns: list[dict[str, Any]]) -> Rows:
    """The rows that `packed` was given."""
    rows = []
    for group in columns:
        same = {name: value for name, value in group.items() if name != "columns"}
        names = list(group["columns"])
        for values in zip(*group["columns"].values(), strict=True):
            rows.append(same | dict(zip(names, values, strict=True)))
    return rows


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value


def perplexity(rows: Rows) -> str:
    """A line for each text and mode."""
    lines = []
    for text, of_text in _split(rows, "text"):
        exact = _by(of_text, "exact", "window")
        for mode, mine in _split(of_text, "mode"):
            pairs = [(row, exact[row["window"]]) for row in mine if row["window"] in exact]
            if not pairs:
                continue
            loss = mean_interval([row["losses"] for row, _ in pairs])[0]
            delta = mean_interval([_differences(row["losses"], e["losses"]) for row, e in pairs])
            against = "" if mode == "exact" else _percent([math.exp(d) - 1 for d in delta])
            lines.append(
                [text, mode, _share(mine), f"{math.exp(loss):.3f}", against]
                + [f"{_mean(mine, 'kl'):.4f}", f"{_mean(mine, 'agreement'):.1%}"]
                + [f"{len(pairs)} x {len(mine[0]['losses'])} blocks"]
            )
    head = "text, mode, KV read, perplexity, against exact [95%], mean KL, same token, windows"
    return _table(head.split(", "), lines)


def ruler(rows: Rows) -> str:
    """A line for each task and length with all modes, then the means over tasks."""
    import ruler as tasks

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = []
    for length, of_length in _split(rows, "length"):
        for task, of_task in _split(of_length, "task"):
            lines.append(_ruler_line([task, str(length)], of_task, modes))
    everything: list[tuple[str, Callable[[str], bool]]] = [
        ("all standard", lambda task: task in tasks.STANDARD),
        ("all easier", lambda task: task in tasks.EASIER),
        ("all", lambda task: True),
    ]
    for length in [*dict.fromkeys(row["length"] for row in rows), None]:
        for name, belongs in everything:
            some = [r for r in rows if belongs(r["task"]) and length in (None, r["length"])]
            if some:
                lines.append(_ruler_line([name, str(length or "all")], some, modes))
    head = ["task", "tokens", "questions", "exact"] + [mode for mode in modes if mode != "exact"]
    return _table(head, lines)


def _ruler_line(start: list[str], rows: Rows, modes: Sequence[str]) -> list[str]:
    exact = {_question(row): row for row in rows if row["mode"] == "exact"}
    score = 100 * mean_interval([[row["score"] for row in exact.values()]], rounds=1)[0]
    line = [*start, str(len(exact)), f"{score:.1f}"]
    for mode in modes:
        if mode == "exact":
            continue
        mine = [row for row in rows if row["mode"] == mode and _question(row) in exact]
        if not mine:
            line.append("")
            continue
        # Every cell counts alike in a mean over cells, since all have as many questions.
        deltas = [100 * (row["score"] - exact[_question(row)]["score"]) for row in mine]
        mean, low, high = mean_interval([[delta] for delta in deltas])
        line.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}], {_share(mine)}")
    return line


def _question(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["length"], row["question"]


def generation(rows: Rows) -> str:
    """A line for each mode, over all prompts."""
    lines = []
    for mode, mine in _split(rows, "mode"):
        kl = mean_interval([[row["kl"]] for row in mine])
        same = mean_interval([[100 * row["same_token"]] for row in mine])
        agrees = sorted(row["agrees_for"] for row in mine)[len(mine) // 2]
        lines.append(
            [mode, str(len(mine)), _share(mine), _plain(kl, 4), _plain(same, 1), str(agrees)]
            + [f"{_mean(mine, 'distinct_4grams'):.1%}", f"{_mean(mine, 'repeated'):.1%}"]
        )
    head = "mode, prompts, KV read, mean KL [95%], same token % [95%], median tokens until it"
    head += " differs, distinct 4-grams, repeated within 64"
    return _table(head.split(", "), lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "perplexity": perplexity,
    "ruler": ruler,
    "generation": generation,
}


def _split(rows: Rows, field: str) -> Iterable[tuple[Any, Rows]]:
    found: dict[Any, Rows] = {}
    for row in rows:
        found.setdefault(row[field], []).append(row)
    return found.items()


def _by(rows: Rows, mode: str, field: str) -> dict[Any, dict[str, Any]]:
    return {row[field]: row for row in rows if row["mode"] == mode}


def _differences(losses: list[float], exact: list[float]) -> list[float]:
    return [mine - other for mine, other in zip(losses, exact, strict=True)]


def _mean(rows: Rows, field: str) -> float:
    return float(sum(row[field] for row in rows) / len(rows))


def _share(rows: Rows) -> str:
    return f"{_mean(rows, 'kv_read'):.0%}"


def _percent(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:+.2%} [{low:+.2%}, {high:+.2%}]"


def _plain(interval: Interval, digits: int) -> str:
    mean, low, high = interval
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()

"""What the demo prints, writes and draws."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .run import EXACT, MODES, PACKED, REUSE, SDPA, Result, common_beginning
from .verified import Verified

LOSSLESS = "lossless"

LABELS = {
    EXACT: "exact decode",
    REUSE: "MAC reuse",
    SDPA: "SDPA as transformers calls it",
    PACKED: "SDPA, query heads packed",
    LOSSLESS: "MAC drafts, exact verifies",
}
COLORS = {EXACT: "#4c6a92", REUSE: "#d1495b", SDPA: "#a0a0a0", PACKED: "#66a182"}
WIDTH = 98
_ROW = "{:30}{:>11}{:>9}{:>10}{:>8}{:>13}{:>12}"


def summary(result: Result, verified: Verified | None = None) -> dict[str, Any]:
    """The figures of the table, for JSON: times in milliseconds, shares from 0 to 1."""
    steps = len(result.hit_rate)
    modes: dict[str, dict[str, float]] = {}
    for mode in MODES:
        trace = result.traces[mode]
        pairs = zip(trace.tokens, result.traces[EXACT].tokens, strict=True)
        modes[mode] = {
            "attention_ms": 1e3 * median(trace.attention_seconds),
            "step_ms": 1e3 * median(trace.step_seconds),
            "kv_read_share": result.total_kv_read_share if mode == REUSE else 1.0,
            "same_tokens": sum(a == b for a, b in pairs),
            "mean_kl": fmean(trace.kl),
        }
    if verified is not None:
        modes[LOSSLESS] = {
            "attention_ms": 1e3 * verified.attention_seconds / steps,
            "step_ms": 1e3 * verified.seconds / steps,
            "kv_read_share": verified.stats.kv_read_share,
            "same_tokens": common_beginning(result.traces[EXACT].tokens, verified.tokens),
            "mean_kl": 0.0,
            "acceptance": verified.stats.acceptance,
            "tokens_per_verification": verified.stats.tokens_per_verification,
        }
    return {
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": steps,
        "prefill_s": result.prefill_seconds,
        "hit_rate": result.total_hit_rate,
        "kv_read_share": result.total_kv_read_share,
        "search_share": result.search_share,
        "same_text_tokens": result.free_agreement,
        "modes": modes,
        "steps": {
            "hit_rate": result.hit_rate,
            "kv_read_share": result.kv_read_share,
            **{
                f"attention_ms_{m}": [1e3 * s for s in t.attention_seconds]
                for m, t in result.traces.items()
            },
        },
    }


def table(figures: dict[str, Any]) -> str:
    """The comparison as text."""
    modes, steps = figures["modes"], figures["new_tokens"]
    exact = modes[EXACT]["attention_ms"]
    lines = [
        _ROW.format("", "attention", "against", "whole", "KV", "same greedy", "mean KL"),
        _ROW.format("", "per step", "exact", "step", "read", "token", "divergence"),
        "─" * len(_ROW.format(*[""] * 7)),
    ]
    for mode, row in modes.items():
        same = f"{row['same_tokens']}/{steps}"
        kl = "-" if mode in (EXACT, LOSSLESS) else f"{row['mean_kl']:.5f}"
        times = exact / row["attention_ms"]
        cells = (f"{row['attention_ms']:.2f} ms", f"{times:.2f}x", f"{row['step_ms']:.1f} ms")
        lines.append(_ROW.format(LABELS[mode], *cells, f"{row['kv_read_share']:.1%}", same, kl))
    return "\n".join(lines)


def meaning(figures: dict[str, Any]) -> str:
    """What the table says, in a few sentences."""
    modes = figures["modes"]
    reuse, exact = modes[REUSE], modes[EXACT]["attention_ms"]
    sdpa = min(modes[SDPA]["attention_ms"], modes[PACKED]["attention_ms"])
    hits, read = figures["hit_rate"], figures["kv_read_share"]
    text = (
        f"{hits:.0%} of the queries (per step, layer and head) found a similar recent one and "
        f"reused its attention to the old context, so that {read:.0%} of the KV cache was read. "
        f"Attention took {_times(reuse['attention_ms'], exact)} exact decode by the same library, "
        f"and {_times(reuse['attention_ms'], sdpa)} SDPA at its best here. At "
        f"{reuse['same_tokens']} of {figures['new_tokens']} steps the most likely next token was "
        f"that of exact decode, with SDPA at {modes[SDPA]['same_tokens']}: the rows of SDPA show "
        "what rounding alone changes, the rest is the price of reuse."
    )
    if LOSSLESS in modes:
        row = modes[LOSSLESS]
        text += (
            f" Where such steps only draft and one exact step verifies several, "
            f"{row['acceptance']:.0%} of the drafts were accepted, a verification yielded "
            f"{row['tokens_per_verification']:.1f} tokens, and the first {row['same_tokens']} are "
            "those of exact decode: all, but for ties in rounding."
        )
    return textwrap.fill(text, WIDTH)


def _times(mine: float, other: float) -> str:
    ratio = other / mine
    if ratio >= 1:
        return f"{ratio:.1f}x less time than"
    return f"{1 / ratio:.1f}x the time of"


def notes(figures: dict[str, Any]) -> str:
    """How the table was measured."""
    text = (
        "Medians over the steps. Attention is the sum over the layers of the time inside the "
        "attention call, for reuse with match and completion; all four work in place on "
        "preallocated caches, so that SDPA is not charged for growing one. KV read counts keys and "
        f"values; a match also reads recent queries, at most {figures['search_share']:.0%} as many "
        "bytes as the KV cache has. Every step feeds the token that exact decode chose to all "
        "four, one after the other. Divergence in nats, from the distribution of exact decode."
    )
    if LOSSLESS in figures["modes"]:
        text += " The last row writes a text of its own: means over its tokens."
    return textwrap.fill(text, WIDTH)


def texts(result: Result, decode: Callable[[list[int]], str], characters: int = 420) -> str:
    """The beginnings of both generated texts."""
    same, total = result.free_agreement, len(result.free_tokens)
    verdict = "is the same" if same == total else f"is the same for {same} tokens"
    blocks = []
    for title, tokens in (
        ("Exact decode writes:", result.traces[EXACT].tokens),
        (f"MAC reuse on its own writes (the text {verdict}):", result.free_tokens),
    ):
        snippet = " ".join(decode([result.first_token, *tokens]).split())
        snippet = textwrap.shorten(snippet, characters, placeholder=" ...")
        body = textwrap.fill(snippet, WIDTH, initial_indent="  ", subsequent_indent="  ")
        blocks.append(f"{title}\n{body}")
    return "\n\n".join(blocks)


def plot(result: Result, title: str, path: Path) -> None:
    """Hit rate and attention time over the steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    steps = range(1, len(result.hit_rate) + 1)
    top.plot(steps, result.hit_rate, color=COLORS[REUSE], alpha=0.3, linewidth=1)
    top.plot(steps, _smooth(result.hit_rate), color=COLORS[REUSE], linewidth=2)
    top.set_ylim(0, 1)
    top.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    top.set_ylabel("hit rate")
    for mode in (SDPA, PACKED, EXACT, REUSE):
        times = [1e3 * seconds for seconds in result.traces[mode].attention_seconds]
        bottom.plot(steps, times, color=COLORS[mode], alpha=0.3, linewidth=1)
        smooth = _smooth(times)
        bottom.plot(steps, smooth, color=COLORS[mode], linewidth=2)
        bottom.annotate(
            LABELS[mode],
            (len(smooth), smooth[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            color=COLORS[mode],
            va="center",
            annotation_clip=False,
        )
    bottom.set_yscale("log")
    bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bottom.yaxis.set_minor_formatter(NullFormatter())
    bottom.set_ylabel("attention per step (ms, log scale)")
    bottom.set_xlabel("generated token")
    for axes in (top, bottom):
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _smooth(values: list[float], window: int = 15) -> list[float]:
    """Running median, centred: a stall of the machine leaves no bump."""
    half = window // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]

"""What the method's authors publish of their own kernel, to stand beside ours.

github.com/YJHMITWEB/MAC-Attention, results/cuda_graph_hit_curves (July 2026): one H100, both sides
as CUDA-graph replays back to back, so with what the L2 cache still holds, bfloat16, head_dim 128,
page size 1, band 256. Microseconds. As their source has it: hits are 64 steps old
(`--bench-match-lag-mean`), so that one attends afresh to 320 tokens; the ring has 2,048 entries
(`--capacity`; 512 is their server's setting); FlashInfer is its CUDA-core kernel, not the faster
one. `hit_curve.py --authors` measures ours in that setting.
"""

from __future__ import annotations

# (query/KV heads, batch, context): FlashInfer, and theirs at hit rates 0, 0.95 and 1
_PUBLISHED = {
    ("32/4", 1, 32768): (60, {0.0: 159, 0.95: 143, 1.0: 68}),
    ("32/4", 1, 126976): (170, {0.0: 296, 0.95: 196, 1.0: 68}),
    ("32/4", 16, 126976): (2531, {0.0: 3293, 0.95: 563, 1.0: 230}),
    ("32/4", 64, 32768): (2943, {0.0: 3978, 0.95: 1028, 1.0: 708}),
    ("32/4", 64, 126976): (11354, {0.0: 13228, 0.95: 1646, 1.0: 708}),
    ("32/8", 1, 126976): (191, {0.0: 393, 0.95: 188, 1.0: 70}),
    ("32/8", 16, 126976): (2966, {0.0: 4673, 0.95: 703, 1.0: 298}),
    ("32/8", 64, 126976): (12770, {0.0: 19107, 0.95: 2432, 1.0: 969}),
}


def authors_speedup(layout: str, batch: int, context: int, rate: float) -> float | None:
    """FlashInfer's time over theirs, or None where this page has no figure."""
    flashinfer, theirs = _PUBLISHED.get((layout, batch, context), (0, {}))
    return flashinfer / theirs[rate] if rate in theirs else None

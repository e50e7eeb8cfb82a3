"""bench/sampled.py on captures whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("bench_modules")
TOKENS, ROWS, WINDOW, BAND = 300, 120, 64, 16


def replay(tmp_path, q):
    """Two layers of two KV heads; `q` [L, R, Hq, D] is also the query before the rotation."""
    import sampled

    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 2, TOKENS, 2, 16, generator=generator)
    torch.save({"q": q, "qm": q, "k": k, "v": v, "scale": 0.25}, tmp_path / "capture.pt")
    return sampled.Replay(str(tmp_path / "capture.pt"), count=40, stride=2, max_window=WINDOW)


def queries(*shape: int):
    return torch.randn(*shape, 4, 16, generator=torch.Generator().manual_seed(0))


def options(**changed):
    import sampled

    return sampled.Options(
        **{"window": WINDOW, "band": BAND, "entries": 8, "samples": 32} | changed
    )


def test_nothing_hits_at_threshold_0(tmp_path):
    tried = replay(tmp_path, queries(2, ROWS))
    row = tried.evaluate(options(), tried.decide(options(threshold=0.0)))
    assert (row["full"], row["error"], row["read"]) == (1.0, 0.0, 1.0)


def test_a_hit_on_an_equal_query_is_exact(tmp_path):
    tried = replay(tmp_path, queries(2, 1).expand(2, ROWS, 4, 16).contiguous())
    back = tried.decide(options())
    assert (back[-40:] > 0).mean() > 0.9
    row = tried.evaluate(options(), back)
    assert row["read"] < 0.5
    assert row["error"] < 1e-5


def test_only_seeds_and_misses_are_reused_within_window_and_half_of_the_context(tmp_path):
    tried = replay(tmp_path, queries(2, 1) + 0.4 * queries(2, ROWS))
    back = tried.decide(options(threshold=0.25))
    hits = np.argwhere(back > 0)
    assert 0.2 < len(hits) / back.size < 0.9
    for t, head in hits:
        age = back[t, head]
        assert age <= WINDOW and age + BAND + 32 <= (tried.first + WINDOW + t + 1) / 2
        assert t < age or back[t - age, head] == 0


@pytest.mark.parametrize("drift", [0.5, 2.0, None])
def test_a_hit_is_within_the_threshold_and_the_drift_and_a_miss_is_not(tmp_path, drift):
    # Queries of four sizes, so that the bound is what decides for some and not for others.
    size = torch.tensor([0.3, 0.6, 1.2, 2.4])[:, None]
    q = size * (queries(2, 1) + 0.4 * queries(2, ROWS))
    tried = replay(tmp_path, q)
    back = tried.decide(options(threshold=0.25, max_drift=drift))
    assert 0.1 < (back > 0).mean() < 0.9
    keys = tried.k[:, torch.arange(512) * (tried.first + WINDOW) // 512]
    spread = 0.25**2 * keys.double().var(1, correction=0).mean(-1)  # [H]
    of_head = tried.qm.double()  # [H, G, R, D]

    def score(h, row, old):
        now = of_head[h, :, row]
        allowed = 0.25 * now.square().sum(-1)
        if drift is not None:
            allowed = allowed.clamp(max=drift / float(spread[h]))
        return float(((now - of_head[h, :, old]).square().sum(-1) / allowed).mean())

    for t, h in np.argwhere(back > 0):
        assert score(h, WINDOW + t, WINDOW + t - back[t, h]) < 1.01  # float16
    # The first step has the last prompt queries to choose from, as far as a hit is worth taking.
    for h in np.argwhere(back[0] == 0)[:, 0]:
        ages = [b for b in range(1, 9) if b + BAND + 32 <= (tried.first + WINDOW + 1) / 2]
        assert ages and min(score(h, WINDOW, WINDOW - b) for b in ages) > 0.99

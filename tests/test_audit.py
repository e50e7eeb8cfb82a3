"""ReuseCache.audit: the errors it reports are those of the steps it samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mac_attn
from mac_attn import ReuseCache, ReuseConfig

HEADS, KV_HEADS, DIM, LENGTH, STEPS = 4, 2, 64, 80, 40
CONFIG = ReuseConfig(
    entries=16, window=16, band=8, anchors=4, threshold=0.8, max_drift=None, min_context=16
)


def audited(device: torch.device, num_slots: int, every: int | None) -> ReuseCache:
    reuse = ReuseCache(
        CONFIG,
        num_slots=num_slots,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.bfloat16,
        device=device,
    )
    reuse.audit(every)
    return reuse


def run(
    device: torch.device, every: int | None, poison: int | None = None
) -> tuple[ReuseCache, Tensor, Tensor, Tensor]:
    """Decode two requests; returns the cache, out and exact `[steps, B, Hq, D]`, lengths."""
    kv = torch.randn(2, 2, LENGTH, KV_HEADS, DIM, dtype=torch.bfloat16).to(device)
    cache, table = mac_attn.dense_as_pages(kv[0], kv[1])
    reuse = audited(device, 3, every)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
    base = torch.randn(2, HEADS, DIM)
    outs, exacts, lengths = [], [], []
    for step in range(STEPS):
        noise = 0.9 if step % 3 == 0 else 0.3  # of these some hit and some do not
        q = (base + noise * torch.randn(2, HEADS, DIM)).to(device, torch.bfloat16)
        if step == poison:
            q[0] = torch.nan
        # The second request is a padding row for some steps.
        lens = [
            LENGTH - STEPS + step + 1,
            0 if step % 5 == 4 else LENGTH - STEPS + step - step // 5,
        ]
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        exacts.append(mac_attn.decode(q, cache, table, seq_lens))
        outs.append(mac_attn.decode(q, cache, table, seq_lens, reuse=reuse, slots=slots, q_match=q))
        lengths.append(seq_lens)
    return reuse, torch.stack(outs), torch.stack(exacts), torch.stack(lengths)


def expected_errors(out: Tensor, exact: Tensor, lengths: Tensor, every: int) -> Tensor:
    """`[sampled, Hq]` by the definition."""
    slots = torch.tensor([2, 0], device=lengths.device)
    sampled = (lengths > 0) & ((lengths + slots) % every == 0)
    difference = (out - exact.double()).norm(dim=-1) / exact.double().norm(dim=-1)
    return difference[sampled].cpu()


@pytest.mark.parametrize("every", [1, 3, 7])
def test_reports_the_sampled_steps(device: torch.device, every: int) -> None:
    reuse, out, exact, lengths = run(device, every)
    errors = expected_errors(out, exact, lengths, every)
    report = reuse.audited()
    assert report.every == every and report.steps == len(errors) > 0
    # Sums of the same doubles in another order.
    torch.testing.assert_close(report.error, errors.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(report.max_error, errors.amax(0), rtol=1e-9, atol=0)
    assert float(report.max_error.max()) > 0.05  # reuse was not exact, or this tests nothing
    if every == 1:
        assert int(report.hits.sum()) == reuse.stats().query_head_hits
        # A miss is exact: all of the error but rounding stems from hits.
        share = report.hit_error * report.hits / report.steps
        torch.testing.assert_close(share, report.error, rtol=0, atol=2e-3)
    assert "steps audited" in str(report)


@pytest.mark.parametrize("every", [1, 3])
def test_each_token_of_a_step_of_several(device: torch.device, every: int) -> None:
    """Is a step of its own: sampled by its length, and counted among hits by what it reused."""
    kv = torch.randn(2, 2, LENGTH, KV_HEADS, DIM, dtype=torch.bfloat16).to(device)
    cache, table = mac_attn.dense_as_pages(kv[0], kv[1])
    reuse = ReuseCache(
        CONFIG, num_slots=3, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    reuse.audit(every)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
    base = torch.randn(2, 1, HEADS, DIM)
    errors = []
    for step in range(STEPS):
        # Of the second KV head one token is now and then like none before it.
        noise = torch.full((2, 3, HEADS, 1), 0.3)
        noise[:, step % 3, 2:] = 3.0 if step % 2 else 0.3
        q = (base + noise * torch.randn(2, 3, HEADS, DIM)).to(device, torch.bfloat16)
        given = [3, 1 + step % 3]
        ends = [0 if step % 7 == 5 else 30 + step + 3, 20 + step + given[1]]
        lens, query_lens = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in (ends, given)
        )
        call = (q, cache, table, lens)
        exact = mac_attn.decode(*call, query_lens=query_lens).double().cpu()
        out = mac_attn.decode(
            *call, query_lens=query_lens, reuse=reuse, slots=slots, q_match=q
        ).cpu()
        for b, (end, tokens, slot) in enumerate(zip(ends, given, slots.tolist(), strict=True)):
            for t in range(tokens if end else 0):
                if (end - tokens + t + 1 + slot) % every == 0:
                    off = (out[b, t] - exact[b, t]).norm(dim=-1) / exact[b, t].norm(dim=-1)
                    errors.append(off)
    want, report = torch.stack(errors), reuse.audited()
    assert report.steps == len(want) > STEPS // every
    torch.testing.assert_close(report.error, want.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(report.max_error, want.amax(0), rtol=1e-9, atol=0)
    if every == 1:
        assert int(report.hits.sum()) == reuse.stats().query_head_hits
        assert (report.hits[:2] > report.hits[2:]).all() and (report.hits[2:] > 0).all()
        share = report.hit_error * report.hits / report.steps
        torch.testing.assert_close(share, report.error, rtol=0, atol=2e-3)


def test_changes_nothing(device: torch.device) -> None:
    torch.manual_seed(5)
    reuse, out, *_ = run(device, 2)
    torch.manual_seed(5)
    other, plain, *_ = run(device, None)
    assert torch.equal(out, plain)
    assert torch.equal(reuse.counters, other.counters)
    with pytest.raises(ValueError, match="no audit is on"):
        other.audited()


def test_leaves_non_finite_out(device: torch.device) -> None:
    reuse, out, *_ = run(device, 1, poison=7)
    report = reuse.audited()
    assert out[7, 0].isnan().any()
    assert report.steps == STEPS - 1 + STEPS - STEPS // 5
    assert report.error.isfinite().all() and report.max_error.isfinite().all()


def one_request(device: torch.device, every: int) -> tuple[ReuseCache, Tensor, Tensor]:
    """Rings that are audited, and 64 tokens in a paged KV cache."""
    kv = torch.randn(2, 1, 64, KV_HEADS, DIM, dtype=torch.bfloat16, device=device)
    cache, table = mac_attn.dense_as_pages(kv[0], kv[1])
    return audited(device, 1, every), cache, table


def test_keeps_no_graph(device: torch.device) -> None:
    """Where torch.no_grad() was forgotten."""
    reuse, cache, table = one_request(device, every=1)
    q = torch.randn(1, HEADS, DIM, dtype=torch.bfloat16, device=device, requires_grad=True)
    seq_lens, slots = (torch.tensor([n], dtype=torch.int32, device=device) for n in (40, 0))
    mac_attn.decode(q, cache, table, seq_lens, reuse=reuse, slots=slots, q_match=q.detach())
    report = reuse.audited()
    assert report.steps == 1 and not report.error.requires_grad


def test_begins_anew(device: torch.device) -> None:
    reuse, *_ = run(device, 1)
    assert reuse.audited().steps > 0
    reuse.audit(every=4)
    report = reuse.audited()
    assert report.steps == 0 and report.mean_error == 0 and report.every == 4


@pytest.mark.parametrize("every, error", [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_refuses(every: object, error: type[Exception]) -> None:
    reuse = ReuseCache(
        CONFIG, num_slots=1, num_qo_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32
    )
    with pytest.raises(error, match="every"):
        reuse.audit(every)  # type: ignore[arg-type]


def test_cuda_graph_samples(cuda: torch.device) -> None:
    """Which rows are sampled is decided on the device, so a replayed graph samples too."""
    reuse, cache, table = one_request(cuda, every=4)
    q = torch.randn(1, HEADS, DIM, dtype=torch.bfloat16, device=cuda)
    seq_lens = torch.full((1,), 21, dtype=torch.int32, device=cuda)
    slots = torch.zeros(1, dtype=torch.int32, device=cuda)

    def step() -> None:
        mac_attn.decode(q, cache, table, seq_lens, reuse=reuse, slots=slots, q_match=q)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = reuse.audited().steps
    for _ in range(16):
        seq_lens += 1
        graph.replay()
    assert reuse.audited().steps - before == 4

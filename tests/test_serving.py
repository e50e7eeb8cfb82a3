"""What a server may rely on, promise by promise: docs/serving.md says it, this file shows it.

Every step of a `Server` is compared with the reference: output, log-sum-exp, ring and counters.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cases import plain_dtype
from serving import Request, Server, serving_config
from torch import Tensor

import mac_attn
from mac_attn import ReuseCache


def make_server(device: torch.device, seed: int = 0, **options: Any) -> Server:
    """float32 heads of 16 on the CPU, what the kernels take on CUDA."""
    head_dim, dtype = 64 if device.type == "cuda" else 16, plain_dtype(device)
    cfg = serving_config(head_dim, **options.pop("cfg", {}))
    return Server(
        cfg, head_dim=head_dim, dtype=dtype, device=device, max_length=96, seed=seed, **options
    )


def run(server: Server, *requests: Request, steps: int, isolate: bool = False) -> None:
    for _ in range(steps):
        server.decode(requests, isolate=isolate)


def hits(server: Server) -> int:
    """KV head hits so far; a scenario without any would show nothing."""
    return server.counts.hits


def newest_source(server: Server, request: Request, length: int) -> Tensor:
    """What match finds for a request of that length, asking with its newest stored query."""
    cache, slot = server.cache, request.slot
    newest = ((cache.ring_stored[slot] - 1) % cache.cfg.entries).tolist()
    query = torch.cat([cache.ring_query[slot, h, at] for h, at in enumerate(newest)])[None]
    rows = server.rows([request])
    lens = server.ints([length])
    return mac_attn.match(cache, query, lens, rows["slots"], rows["request_ids"]).source


def oldest(server: Server, slot: int) -> int:
    """Position of the oldest entry of a slot's history."""
    return min(min(server.reference.entries(slot, head)) for head in range(2))


@pytest.mark.parametrize("ids", [True, False])
def test_a_new_request_whose_length_continues_the_old_one(ids, device):
    """The history rule alone would let it pass: with ids it is told apart, without it needs the
    `reset` that `Server.start` makes."""
    server = make_server(device, ids=ids)
    old = server.start(1, 10)
    run(server, old, steps=15)
    server.finish(old)
    new = server.start(1, 25)
    assert (newest_source(server, new, 26) == -1).all()
    before = hits(server)
    run(server, new, steps=1)
    assert hits(server) == before  # nothing to reuse yet
    run(server, new, steps=14)
    assert hits(server) > before
    server.check_slots()


def test_without_ids_and_without_reset_a_slot_cannot_tell(device):
    """The one way to mix two requests up: why docs/serving.md asks for ids or `reset`."""
    server = make_server(device, ids=False)
    old = server.start(1, 10)
    run(server, old, steps=15)
    assert (newest_source(server, old, 26) >= 0).any()
    server.cache.reset(1)
    assert (newest_source(server, old, 26) == -1).all()


def test_seed_does_not_continue_another_request(device):
    """A prompt whose seeded tail begins where the slot's last request stopped."""
    server = make_server(device)
    old = server.start(0, 10)
    run(server, old, steps=10)
    new = server.start(0, 26, seeded=6)  # the tail is [20, 26)
    assert int(server.cache.slot_end[0]) == 26 and oldest(server, 0) >= 20
    run(server, new, steps=12)
    server.check_slots()


def test_reset_in_the_middle_of_a_request(device):
    server = make_server(device)
    request, other = server.start(2, 12), server.start(0, 8)
    run(server, request, other, steps=12)
    server.reset_slot(2)
    server.check_slots()
    run(server, request, other, steps=12)
    assert hits(server) > 0


@pytest.mark.parametrize("ids", [True, False])
def test_fork_and_its_source_part(ids, device):
    """Both go on with tokens of their own; neither sees what the other adds."""
    server = make_server(device, ids=ids)
    source = server.start(0, 12)
    run(server, source, steps=10)
    fork = server.fork(source, 3)
    server.check_slots()
    run(server, fork, steps=6, isolate=True)
    run(server, source, steps=6, isolate=True)
    run(server, source, fork, steps=12, isolate=True)
    again = server.fork(fork, 1)  # a fork of a fork, while its source goes on
    run(server, source, fork, again, steps=10, isolate=True)
    assert hits(server) > 0
    server.check_slots()


def test_a_fork_under_an_id_of_its_own_must_be_named(device):
    """Without `request_ids` the copy still belongs to its source's request."""
    server = make_server(device)
    source = server.start(0, 12)
    run(server, source, steps=10)
    server.cache.fork(0, 1)
    server.cache.fork(0, 2, request_ids=77)
    assert server.cache.slot_request[[0, 1, 2]].tolist() == [source.id, source.id, 77]
    for slot, id_, hit in [(1, source.id, True), (1, 77, False), (2, 77, True), (2, 5, False)]:
        probe = Request(id_, [], [], slot)
        assert bool((newest_source(server, probe, 23) >= 0).any()) == hit, (slot, id_)


@pytest.mark.parametrize("rejected", [1, 5, 8, 12])
def test_rejected_drafts_then_other_tokens(rejected, device):
    """Also more of them than the ring has places: entries they had overwritten stay lost."""
    server = make_server(device)
    request, other = server.start(0, 10), server.start(1, 10)
    run(server, request, other, steps=20)
    for _ in range(3):
        server.truncate(request, rejected)
        server.check_slots()
        run(server, request, other, steps=rejected + 1, isolate=True)
    assert hits(server) > 0


def test_truncate_is_idempotent_and_may_name_the_future(device):
    server = make_server(device)
    request = server.start(0, 10)
    run(server, request, steps=20)
    for length in (10**6, len(request), 22, 22, 25):
        server.cache.truncate(0, length)
        server.reference.truncate([0], [length])
        server.check_slots()


@pytest.mark.parametrize(("seeded", "chunks"), [(8, 1), (5, 3), (8, 3), (1, 2)])
@pytest.mark.parametrize("anchors", [0, 4])
def test_prefill_in_chunks(seeded, chunks, anchors, device):
    """Each chunk seeds its tail; a longer one leaves a gap, and the ring starts anew."""
    server = make_server(device, cfg=dict(anchors=anchors))
    for slot, length in enumerate((24, 15, 3)):
        request = server.start(slot, length, seeded=seeded, chunks=chunks)
        run(server, request, steps=10)
    assert hits(server) > 0
    server.check_slots()


def test_pause_and_resume(device):
    """A request that is not in the batch, or in it as a padding row, is left alone."""
    server = make_server(device)
    one, other = server.start(0, 14), server.start(1, 14)
    run(server, one, other, steps=10)
    before = server.cache.ring[0].clone()
    run(server, other, steps=7)
    assert torch.equal(server.cache.ring[0], before)
    run(server, one, other, steps=10, isolate=True)
    assert hits(server) > 0


def test_a_token_that_was_decoded_elsewhere_breaks_the_history(device):
    """A step skipped by reuse but not by the model: the slot starts anew, and stays right."""
    server = make_server(device)
    request = server.start(0, 14)
    run(server, request, steps=10)
    server.append(request, [7])
    assert (newest_source(server, request, len(request) + 1) == -1).all()
    run(server, request, steps=10)
    assert oldest(server, 0) >= 25
    server.check_slots()


def test_swapped_out_and_in(device):
    """Elsewhere, while another request has its old slot; then back again."""
    server = make_server(device)
    one, other = server.start(0, 12), server.start(1, 12)
    run(server, one, other, steps=10)
    server.swap_out(one)
    third = server.start(0, 20, seeded=6)
    run(server, other, third, steps=9)
    server.resume(one, 3)
    server.check_slots()
    before = hits(server)
    run(server, one, other, third, steps=10, isolate=True)
    assert hits(server) > before
    server.swap_out(one)
    server.swap_out(third)
    server.resume(one, 0)
    server.resume(third, 3)
    run(server, one, other, third, steps=10)
    server.check_slots()


def test_two_requests_swap_slots(device):
    server = make_server(device)
    one, other = server.start(0, 12), server.start(2, 19)
    run(server, one, other, steps=10)
    server.swap_slots(one, other)
    server.check_slots()
    before = hits(server)
    run(server, one, other, steps=10, isolate=True)
    assert hits(server) > before


def test_two_requests_that_swap_slots_unannounced_meet_nothing(device):
    """Named ids and broken histories both say no: they start anew."""
    server = make_server(device)
    one, other = server.start(0, 15), server.start(2, 15)
    run(server, one, other, steps=10)
    one.slot, other.slot = other.slot, one.slot
    assert (newest_source(server, one, 26) == -1).all()
    run(server, one, other, steps=10, isolate=True)
    server.check_slots()


@pytest.mark.parametrize(
    "cfg",
    [
        dict(entries=3, window=40),
        dict(entries=1, window=1, band=2),
        dict(entries=5, window=5, band=9),
        dict(entries=2, anchors=0, max_reuse_depth=None),
    ],
)
def test_the_ring_goes_round_many_times(cfg, device):
    server = make_server(device, cfg=cfg)
    one, other = server.start(0, 1), server.start(3, 17)
    run(server, one, other, steps=70, isolate=True)
    assert hits(server) > 0


def test_contexts_shorter_than_the_band(device):
    """E(c) = 0: entries stand for nothing, so there is nothing to reuse, up to the band's end."""
    server = make_server(device, cfg=dict(band=16, window=24, min_context=0))
    request = server.start(0, 1)
    run(server, request, steps=15)
    assert hits(server) == 0
    run(server, request, steps=50)  # a hit must not read more than half
    assert hits(server) > 0


def outputs_of(server: Server, steps: int = 40) -> Tensor:
    """Everything that two requests with drafts and a fork answer."""
    one, other = server.start(0, 10), server.start(1, 16, seeded=8)
    got = []
    for i in range(steps):
        got.append(server.decode([one, other]))
        if i % 9 == 8:
            server.truncate(one, 4)
        if i == 20:
            other = server.fork(one, 2)
    return torch.stack(got)


def test_layers_and_threads_are_independent(device):
    """Two caches of different options, from two threads (on CUDA: streams) at once, give bit for
    bit what each gives alone."""
    options = [
        dict(cfg=dict(anchors=0, granularity="head", max_reuse_depth=None)),
        dict(cfg=dict(window=20, band=6)),
    ]
    alone = [outputs_of(make_server(device, seed=i, **o)) for i, o in enumerate(options)]
    servers = [make_server(device, seed=i, **o) for i, o in enumerate(options)]
    together: list[Tensor | None] = [None] * 2

    def serve(i: int) -> None:
        if device.type == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):
                together[i] = outputs_of(servers[i])
                torch.cuda.current_stream().synchronize()
        else:
            together[i] = outputs_of(servers[i])

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(together, alone, strict=True):
        assert got is not None and torch.equal(got, want)
    assert all(hits(server) > 0 for server in servers)


def test_a_cache_on_another_device_is_refused(device):
    server = make_server(device)
    request = server.start(0, 10)
    elsewhere = ReuseCache(
        server.cfg, num_slots=1, num_qo_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16,
        device="meta",
    )  # fmt: skip
    q = torch.zeros(1, 4, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="q is on .*, must be on meta"):
        mac_attn.decode(
            q, (server.k, server.v), server.table([request]), server.ints([10]), reuse=elsewhere,
            slots=server.ints([0]), q_match=q,
        )  # fmt: skip

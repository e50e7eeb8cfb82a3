"""The floor of a step against counts made by hand, and against sets of what a step touches."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mac_attn
from mac_attn.floor import Floor, num_candidates, step_floor, stores_entry

ROOT = Path(__file__).parent.parent
MODEL = dict(num_qo_heads=4, num_kv_heads=2, head_dim=8, itemsize=2, page_size=16)


def test_exact_step_by_hand():
    floor = step_floor([100, 0, 33], **MODEL)
    # A row is 8 * 2 = 16 bytes. 133 tokens, K and V, 2 KV heads.
    assert floor.kv_bytes == 133 * 2 * 2 * 16 == 8512
    assert floor.block_table_bytes == (7 + 3) * 4  # 100 tokens on 7 pages, 33 on 3
    assert floor.query_bytes == 2 * 4 * (16 + 16 + 4)  # q, out, lse of 4 heads, two requests
    assert floor.flops == 133 * 4 * (2 * 8 + 2 * 8)  # multiply and add: QK and PV
    reuse_parts = (
        floor.anchor_bytes,
        floor.ring_query_bytes,
        floor.ring_query_bytes_max,
        floor.state_read_bytes,
        floor.state_write_bytes,
    )
    assert reuse_parts == (0, 0, 0, 0, 0)
    assert floor.total_bytes == floor.total_bytes_max == 8512 + 40 + 288


def test_a_float8_cache_has_half_the_bytes():
    cfg = mac_attn.ReuseConfig(entries=10, window=50, band=20, anchors=3, min_context=0)
    sources = [[77] * 4, [-1] * 4]
    wide = step_floor([100, 70], **MODEL, cfg=cfg, sources=sources)
    half = step_floor([100, 70], **MODEL, kv_itemsize=1, cfg=cfg, sources=sources)
    listed = 2 * 3 * (4 + 4)  # of two KV heads three anchors, their positions and weights
    assert half.kv_bytes * 2 == wide.kv_bytes
    assert 2 * (half.anchor_bytes - listed) == wide.anchor_bytes - listed
    changed = {"kv_bytes", "anchor_bytes"}
    for field in dataclasses.fields(Floor):
        same = getattr(half, field.name) == getattr(wide, field.name)
        assert same == (field.name not in changed), field.name


def test_shorter_values_have_fewer_bytes():
    cfg = mac_attn.ReuseConfig(entries=10, window=50, band=20, anchors=3, min_context=0)
    steps = dict(cfg=cfg, sources=[[77] * 4, [-1] * 4])
    full = step_floor([100, 70], **MODEL | {"head_dim": 24}, **steps)
    short = step_floor([100, 70], **MODEL | {"head_dim": 24}, head_dim_v=8, **steps)
    tokens = 2 * (100 - 58) + 2 * 70  # of two KV heads
    assert full.kv_bytes - short.kv_bytes == tokens * 16 * 2
    assert full.anchor_bytes - short.anchor_bytes == 2 * 3 * 16 * 2
    assert full.state_read_bytes - short.state_read_bytes == 4 * 16 * 4  # of four hits
    assert full.state_write_bytes - short.state_write_bytes == 4 * 16 * 4  # of four misses
    assert full.query_bytes - short.query_bytes == 2 * 4 * 16 * 2  # what is answered
    attended = 2 * tokens + 2 * 4 * 3  # two heads each; anchors by two queries
    assert full.flops - short.flops == attended * 2 * 16
    same = ("block_table_bytes", "ring_query_bytes", "ring_query_bytes_max")
    assert all(getattr(full, name) == getattr(short, name) for name in same)


def test_group_step_by_hand():
    cfg = mac_attn.ReuseConfig(entries=10, window=50, band=20, anchors=3, min_context=0)
    # Position 99; the first KV head reuses the entry of position 97, so it starts at 97 + 1 - 20.
    floor = step_floor([100], cfg=cfg, sources=[[97, 97, -1, -1]], **MODEL)
    assert floor.kv_bytes == ((100 - 78) + 100) * 2 * 16
    assert floor.anchor_bytes == 3 * (2 * 16 + 4 + 4)
    assert floor.block_table_bytes == 7 * 4  # the other KV head needs all pages
    # Each KV head holds 10 entries: of each a row and a tag.
    assert floor.ring_query_bytes == 10 * 2 * (16 + 4)
    assert floor.ring_query_bytes_max == 10 * (4 * 16 + 2 * 4)
    state = 8 * 4 + 4 + 4  # mean, log-sum-exp, depth
    assert floor.state_read_bytes == 2 * (state + 16)  # and the rotated query
    # The second KV head's entry: both queries and state of 2 heads, 3 anchors, tag. Then end,
    # request, entries stored and tau of 2 KV heads, log-sum-exp of 4 heads; 8 counters read and
    # written.
    entry = 2 * (2 * 16 + state) + 3 * (4 + 4) + 4
    assert floor.state_write_bytes == entry + 4 + 8 + 2 * (4 + 4) + 4 * 4 + 2 * 8 * 8
    assert floor.query_bytes == 4 * (3 * 16 + 4)  # q, q_match, out, lse
    # Two query heads attend to 22 tokens and 3 anchors, those by two queries; two heads to 100
    # tokens; 10 distances of two heads.
    assert floor.flops == (2 * (22 + 2 * 3) + 2 * 100) * 32 + 10 * 2 * 24
    assert floor.total_bytes_max - floor.total_bytes == 10 * 2 * 16


def test_head_step_by_hand():
    cfg = dataclasses.replace(
        mac_attn.ReuseConfig.paper(), entries=10, window=10, band=20, min_context=0
    )
    floor = step_floor([100], cfg=cfg, sources=[[97, -1, 91, 98]], **MODEL)
    # One miss, and its KV head is read in full; of the other the earliest start counts.
    assert floor.kv_bytes == (100 + (100 - 72)) * 2 * 16
    assert floor.anchor_bytes == 0
    assert floor.ring_query_bytes == floor.ring_query_bytes_max == 10 * (4 * 16 + 2 * 4)
    assert floor.state_read_bytes == 3 * 40
    # Chains of any length: every step is stored.
    assert floor.state_write_bytes == 2 * (2 * (16 + 40) + 4) + 4 + 8 + 2 * 4 + 2 * 8 * 8
    assert floor.flops == ((100 - 78) + 100 + (100 - 72) + (100 - 79)) * 32 + 10 * 4 * 24


def test_all_hits_do_not_depend_on_the_context():
    cfg = mac_attn.ReuseConfig(entries=100, window=1000, band=256, anchors=256)
    floors = [
        step_floor([n], cfg=cfg, sources=[[n - 2] * 4], **MODEL) for n in (4096, 8192, 126976)
    ]
    assert floors[0] == floors[1] == floors[2]
    assert floors[0].kv_bytes == 257 * 2 * 2 * 16 and floors[0].block_table_bytes == 17 * 4


def test_candidates():
    def config(**changes: int) -> mac_attn.ReuseConfig:
        options = dict(entries=100, window=10, band=20, anchors=0, min_context=30)
        return mac_attn.ReuseConfig(**options | changes)

    # Position 29: candidates 20 .. 28 (E(c) > 0 needs c >= 20); from position 30 on a full window.
    lengths = (0, 1, 29, 30, 31, 32, 1000)
    assert [num_candidates(n, config()) for n in lengths] == [0, 0, 0, 9, 10, 10, 10]
    few = config(entries=4, window=100)
    assert [num_candidates(n, few) for n in lengths] == [0, 0, 0, 4, 4, 4, 4]
    # With anchors: age + 20 + min(8, a sixth of the old tokens) may not exceed half of n.
    sampled = config(window=100, anchors=8)
    lengths = (44, 45, 46, 60, 100, 256, 1000)
    assert [num_candidates(n, sampled) for n in lengths] == [0, 0, 0, 4, 22, 100, 100]


def test_only_what_may_be_reused_is_stored():
    sources = [97, 97, -1, -1, 97, -1]
    chains = mac_attn.ReuseConfig(band=20, anchors=0, max_reuse_depth=None)
    heads = mac_attn.ReuseConfig(band=20, anchors=0, granularity="head")
    groups = mac_attn.ReuseConfig(band=20)
    assert stores_entry(100, sources, chains, 2) == [True, True, True]
    assert stores_entry(100, sources, heads, 2) == [False, True, True]
    assert stores_entry(100, sources[:4], groups, 2) == [False, True]
    for cfg in (chains, heads, groups):
        assert not any(stores_entry(20, [-1] * 4, cfg, 2))  # E(19) is 0


@pytest.mark.parametrize("granularity", ["head", "group"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_rows_against_a_set(granularity, page_size):
    """KV rows and pages as the sets of what each head attends to, of random steps."""
    generator = torch.Generator().manual_seed(1)
    cfg = mac_attn.ReuseConfig(
        entries=64, window=64, band=32, anchors=0, min_context=0, granularity=granularity
    )
    model = {**MODEL, "page_size": page_size}
    seq_lens = [200, 1, 333, 65]
    sources = []
    for n in seq_lens:
        hit = torch.randint(0, 3, (4,), generator=generator) > 0
        age = torch.randint(1, 65, (4,), generator=generator)
        if granularity == "group":
            hit, age = hit[[0, 0, 2, 2]], age[[0, 0, 2, 2]]
        position = torch.tensor(n - 1) - age
        sources.append(torch.where(hit & (position >= 32), position, -1).tolist())
    floor = step_floor(seq_lens, cfg=cfg, sources=sources, **model)
    rows, pages, pairs = set(), set(), 0
    for b, n in enumerate(seq_lens):
        for h in range(4):
            c = sources[b][h]
            fresh = range(max(0, c + 1 - 32) if c >= 0 else 0, n)
            rows |= {(b, h // 2, token) for token in fresh}
            pages |= {(b, token // page_size) for token in fresh}
            pairs += len(fresh)
    assert floor.kv_bytes == len(rows) * 2 * 16
    assert floor.block_table_bytes == len(pages) * 4
    distances = sum(num_candidates(n, cfg) for n in seq_lens) * (4 if granularity == "head" else 2)
    assert floor.flops == pairs * 32 + distances * 24


@pytest.mark.parametrize("anchors", [0, 4])
def test_counters_agree_with_the_floor(anchors):
    """What the kernels count as read and as stored is what the floor counts."""
    torch.manual_seed(0)
    cfg = mac_attn.ReuseConfig(
        entries=4, window=16, band=8, anchors=anchors, threshold=0.1, min_context=16
    )
    shape = dict(num_qo_heads=4, num_kv_heads=2, head_dim=16)
    reuse = mac_attn.ReuseCache(cfg, num_slots=1, dtype=torch.float32, **shape)
    kv = torch.randn(8, 2, 16, 2, 16)
    table = torch.randperm(8).int()[None]
    slots = torch.zeros(1, dtype=torch.int32)
    first = torch.randn(1, 4, 16)
    rows = anchor_rows = stored = 0
    for n in range(60, 80):
        q = torch.randn(1, 4, 16)
        q[:, : n % 3 * 2] = first[:, : n % 3 * 2]  # none, the first or both KV heads
        seq_lens = torch.tensor([n], dtype=torch.int32)
        source = mac_attn.match(reuse, q, seq_lens, slots).source.tolist()
        mac_attn.decode(q, kv, table, seq_lens, reuse=reuse, slots=slots, q_match=q)
        floor = step_floor(
            [n], **shape, itemsize=4, page_size=16, cfg=cfg, sources=source
        )  # fmt: skip
        rows += floor.kv_bytes // (2 * 64)
        anchor_rows += floor.anchor_bytes // (2 * 64 + 8)
        stored += sum(stores_entry(n, source[0], cfg, 2))
    stats = reuse.stats()
    assert stats.kv_head_hits > 10
    # Lists of less than S anchors: the floor counts full ones.
    missing = anchor_rows - stats.anchors_read
    assert 0 <= missing < anchor_rows // 2 + 1
    assert stats.kv_tokens_read == rows + stats.anchors_read
    # A sample may overflow, and the first step of a history draws none.
    assert stats.entries_stored == stored if not anchors else 10 < stats.entries_stored < stored


def test_wrong_arguments():
    cfg = mac_attn.ReuseConfig()
    with pytest.raises(ValueError, match="cfg and sources"):
        step_floor([10], cfg=cfg, **MODEL)
    with pytest.raises(ValueError, match="sources has 1 rows, must have 2"):
        step_floor([10, 10], cfg=cfg, sources=[[-1] * 4], **MODEL)
    with pytest.raises(ValueError, match="sources has 3 heads, must have 4"):
        step_floor([10], cfg=cfg, sources=[[-1] * 3], **MODEL)
    with pytest.raises(ValueError, match="num_qo_heads"):
        step_floor([10], **{**MODEL, "num_kv_heads": 3})
    with pytest.raises(dataclasses.FrozenInstanceError):
        step_floor([10], **MODEL).flops = 0
    assert isinstance(step_floor([], **MODEL), Floor)


@pytest.fixture(scope="module")
def simt_traffic(tmp_path_factory):
    """The program of tests/simt/traffic.cpp: runs a CUDA kernel on the host and counts requests."""
    sources = [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("tests/simt/*.*")]
    newest = max(path.stat().st_mtime for path in sources)
    tools = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    for binary in (ROOT / "build").glob("kernels-plain/**/traffic"):  # by `make kernels`
        if binary.stat().st_mtime > newest:
            return binary
    cmake = shutil.which("cmake", path=tools)
    if cmake is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("simt")
    ninja = shutil.which("ninja", path=tools)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), "-DMAC_ATTN_SIMT=ON", *generator],
        [cmake, "--build", str(folder), "--target", "traffic"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (binary,) = folder.glob("**/traffic")
    return binary


def count_traffic(simt_traffic, stage, batch, age, anchors):
    """What the program counts for requests of 1500 tokens, and the floor of that step."""
    seq_lens, num_kv_heads, group_size = [1500] * batch, 2, 4
    shapes = dict(num_kv_heads=num_kv_heads, head_dim=128, page_size=16)
    given = dict(
        stage=stage,
        batch=batch,
        group_size=group_size,
        seq_len=seq_lens[0],
        age=age,
        anchors=anchors,
        window=512,
        band=256,
        ctas=8,
        **shapes,
    )
    command = [str(simt_traffic), *(f"{key}={value}" for key, value in given.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    source = seq_lens[0] - 1 - age if age else -1
    floor = step_floor(
        seq_lens,
        num_qo_heads=num_kv_heads * group_size,
        itemsize=2,
        cfg=mac_attn.ReuseConfig(entries=512, window=512, band=256, anchors=anchors, min_context=0),
        sources=[[source] * num_kv_heads * group_size] * batch,
        **shapes,
    )
    return json.loads(done.stdout), floor


@pytest.mark.parametrize("age, limit", [(0, 1.1), (1, 1.25), (100, 1.25)])
@pytest.mark.parametrize("anchors", [0, 64])
def test_amend_reads_little_more_than_the_floor(simt_traffic, age, limit, anchors):
    """K and V rows that amend copies from the pages, over those it cannot do without."""
    counted, floor = count_traffic(simt_traffic, "amend", 2, age, anchors)
    needed = floor.kv_bytes + floor.anchor_bytes
    assert needed * 0.99 <= counted["async_copy_bytes"] <= needed * limit


@pytest.mark.parametrize("age", [0, 1, 300])
def test_match_reads_little_more_than_the_floor(simt_traffic, age):
    """Ring queries that match loads: of random ones hardly more than the first head of each.

    Of one request: in the program's second one half of the ring holds copies of the query itself.
    """
    counted, floor = count_traffic(simt_traffic, "match", 1, age, 0)
    assert floor.ring_query_bytes * 0.97 <= counted["load_stream_bytes"]
    assert counted["load_stream_bytes"] <= floor.ring_query_bytes * 1.1
    assert floor.ring_query_bytes * 3 < floor.ring_query_bytes_max

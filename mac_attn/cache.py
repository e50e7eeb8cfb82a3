"""The rings of recent queries and their attention states that reuse works with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C
from ._checks import (
    FLOAT_DTYPES,
    INT32_MAX,
    MAX_QUERY_TOKENS,
    check_head_dim,
    check_heads,
    check_int,
    check_type,
)
from ._slot_numbers import Ints, ints, valid_pairs, valid_slots
from .audit import Audit, AuditReport
from .config import ReuseConfig
from .rope import RotaryEmbedding
from .slot_state import Form, SlotState
from .stats import ReuseStats

NO_POSITION = -1  # tag of an empty place of a ring, and an anchor place that is not used
NO_REQUEST = -1

# Bits of ReuseCache.error_flag, set by kernels and by methods that were given values on the GPU.
ERROR_SEQ_LENS, ERROR_BLOCK_TABLE, ERROR_SLOTS = 1, 2, 4
ERRORS = {
    ERROR_SEQ_LENS: "seq_lens held a length outside [0, max_pages * page_size] (decode) or a "
    "negative one (truncate)",
    ERROR_BLOCK_TABLE: "block_table held a page id outside the KV cache among the pages in use",
    ERROR_SLOTS: "slots held a number that is no slot, or one number twice",
}


class ReuseCache:
    """Rings of `num_slots` requests for one layer: recent queries with their attention states.

    Args:
        cfg: the options of reuse.
        num_slots: requests that are served at a time, >= 1; each keeps to one slot.
        num_qo_heads, num_kv_heads: query heads divide evenly among the KV heads.
        head_dim: of queries and keys: a multiple of 8 up to 256, or 512.
        dtype: of the queries and the KV cache: float32, bfloat16 or float16.
        device: where everything lives.
        rotary: the model's rotary embedding; with it `decode` and `seed` need no `q_match`.
        max_batch_size: rows of a call on a GPU, at least `num_slots`, which is the default. Only
            padding and rows that have no slot can make them more.
        layer: number of the model's layer, >= 0, so that layers draw their samples independently.
        head_dim_v: of values and outputs, no more than head_dim and of the same sizes; None is
            head_dim.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
        MemoryError: the device has not enough memory; the message says how much it takes.

    N slots, H KV heads, G query heads per KV head, M entries, S anchors, D head_dim, V head_dim_v:

    Attributes:
        ring: [N, slot bytes] uint8, all that makes up the slots; csrc/ring.h has its layout. The
            next ones are views of it.
        slot_end, slot_reach: [N] int32, from which position to which the slot's next call may
            begin: after the first and after the last query token of its last call.
        slot_request: [N] int64, request id of the slot's last call, -1 if none was given.
        counters: [N, 8] int64, see `ReuseStats`.
        ring_stored: [N, H] int32, entries stored since the slot's history began; beyond M only the
            remainder matters, and the number stays below 2 M. The next entry's place is this % M.
        ring_tau: [N, H] float32, what the key of a token has to exceed to be sampled.
        ring_spread: [N, H] float32, the variance of a logit for a query of unit length, over the
            keys (see `ReuseConfig.max_drift`); 0 where it is not known.
        ring_missed: [N, H] int32, with anchors the steps in a row without a hit; above 32 the KV
            head draws a sample, for a new entry, in every eighth step only.
        ring_last_lse: [N, H, G] float32, log-sum-exp of the slot's last step, of several tokens
            the first's.
        ring_position: [N, H, M] int32, tag: the position c whose entry lies here, -1 for none.
        ring_depth: [N, H, M, G] int32, hits in a row that made the entry; 0 for a miss.
        ring_query: [N, H, M, G, D] dtype, pre-RoPE queries.
        ring_out, ring_lse: [N, H, M, G, V] and [N, H, M, G] float32, the attention states over the
            tokens [0, E(c)), E(c) = max(0, c + 1 - band): softmax-weighted means of values, natural
            log of the sum of exp(logit).
        ring_rotated: [N, H, M, G, D] dtype, post-RoPE queries; [N, H, M, 0, D] without anchors.
        ring_anchors: [N, H, M, S] int32, positions below E(c), ascending, then -1.
        ring_anchor_weights: [N, H, M, S] float32, how many tokens besides itself each stands for.
        threshold: [Hq] float32, see `ReuseConfig.threshold_per_head`.
        error_flag: [1] int32, see `check`.
    """

    slot_end: Tensor
    slot_reach: Tensor
    slot_request: Tensor
    counters: Tensor
    ring_stored: Tensor
    ring_tau: Tensor
    ring_spread: Tensor
    ring_missed: Tensor
    ring_last_lse: Tensor
    ring_position: Tensor
    ring_depth: Tensor
    ring_query: Tensor
    ring_out: Tensor
    ring_lse: Tensor
    ring_rotated: Tensor
    ring_anchors: Tensor
    ring_anchor_weights: Tensor

    def __init__(
        self,
        cfg: ReuseConfig,
        *,
        num_slots: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rotary: RotaryEmbedding | None = None,
        max_batch_size: int | None = None,
        layer: int = 0,
        head_dim_v: int | None = None,
    ) -> None:
        check_type("cfg", cfg, ReuseConfig)
        self.cfg = cfg
        self.layer = check_int("layer", layer, low=0)
        self.num_slots = check_int("num_slots", num_slots, low=1)
        if max_batch_size is None:
            max_batch_size = num_slots
        self.max_batch_size = check_int("max_batch_size", max_batch_size, low=num_slots)
        self.num_qo_heads = check_int("num_qo_heads", num_qo_heads, low=1)
        self.num_kv_heads = check_int("num_kv_heads", num_kv_heads, low=1)
        self.group_size = check_heads(num_qo_heads, num_kv_heads)
        self.head_dim = check_head_dim("head_dim", head_dim)
        self.head_dim_v = head_dim
        if head_dim_v is not None:
            self.head_dim_v = check_head_dim("head_dim_v", head_dim_v)
            if head_dim_v > head_dim:
                raise ValueError(
                    f"head_dim_v is {head_dim_v}, must be at most head_dim, {head_dim}"
                )
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype}, must be {' or '.join(map(str, FLOAT_DTYPES))}")
        self.dtype = dtype
        if rotary is not None:
            check_type("rotary", rotary, RotaryEmbedding)
            if rotary.dim > head_dim:
                raise ValueError(f"rotary rotates {rotary.dim} dims, must be at most {head_dim}")

        # Of `cfg`, as the ops take them: relative, max_drift, per_head, window, band, min_context,
        # max_reuse_depth.
        self.match_options = (
            cfg.threshold_mode == "relative",
            0.0 if cfg.max_drift is None else cfg.max_drift,
            cfg.granularity == "head",
            cfg.window,
            cfg.band,
            cfg.min_context,
            INT32_MAX if cfg.max_reuse_depth is None else cfg.max_reuse_depth,
        )
        threshold = cfg.threshold_per_head(num_qo_heads, head_dim)
        self.error_flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.device = self.error_flag.device  # "cuda" has become "cuda:0", as tensors name it
        self.threshold = threshold.to(self.device)
        self.rotary = None if rotary is None else rotary.to(self.device)
        self.auditor: Audit | None = None
        self._allocate()

    def _layout(self) -> tuple[dict[str, tuple[int, str, list[int], list[int]]], int]:
        """Where the parts of a slot lie, and its bytes: csrc/ring.h."""
        return _C.ring_layout(
            self.num_kv_heads,
            self.group_size,
            self.head_dim,
            self.cfg.entries,
            self.cfg.anchors,
            self.dtype.itemsize,
            self.head_dim_v,
        )

    def _allocate(self) -> None:
        _, slot_bytes = self._layout()
        # What the CUDA kernels keep between launches: Persistent in csrc/backend.h.
        per_token = 2 * self.num_qo_heads + self.num_kv_heads
        each = MAX_QUERY_TOKENS * per_token + 2 * self.num_kv_heads + 1
        numbers = self.max_batch_size * each + 1 if self.device.type != "cpu" else 0
        try:
            shape = (self.num_slots, slot_bytes)
            self.ring = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            self.workspace = torch.zeros(numbers, dtype=torch.int32, device=self.device)
        # The device works (error_flag lies there) and the arguments are valid: it is the size.
        except RuntimeError as error:
            raise MemoryError(
                f"num_slots = {self.num_slots} of {slot_bytes / 2**20:.1f} MiB need "
                f"{self.num_slots * slot_bytes / 2**20:.1f} MiB on {self.device}, "
                "which could not be allocated"
            ) from error
        self._view()
        self._empty(torch.ones(self.num_slots, dtype=torch.bool, device=self.device))

    def _view(self) -> None:
        """Make the views of `ring`."""
        parts, slot_bytes = self._layout()
        for name, (begin, type_name, sizes, strides) in parts.items():
            dtype = self.dtype if type_name == "T" else getattr(torch, type_name)
            view = self.ring.view(dtype).as_strided(
                (self.num_slots, *sizes),
                [step // dtype.itemsize for step in (slot_bytes, *strides)],
                begin // dtype.itemsize,
            )
            setattr(self, name, view)
        # As the ops take it.
        entries, anchors = self.cfg.entries, self.cfg.anchors
        self.ring_arguments = (self.ring, self.num_kv_heads, self.head_dim_v, entries, anchors)

    def __getstate__(self) -> dict[str, Any]:  # a copy makes views of its own ring
        views = {*self._layout()[0], "ring_arguments"}
        return {name: part for name, part in vars(self).items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._view()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.ring, self.threshold, self.error_flag, self.workspace)
        return sum(t.nbytes for t in tensors)

    def __repr__(self) -> str:
        return (
            f"ReuseCache({self.cfg}, num_slots={self.num_slots}, "
            f"num_qo_heads={self.num_qo_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, head_dim_v={self.head_dim_v}, dtype={self.dtype}, "
            f"device='{self.device}'): "
            f"{self.nbytes / 2**20:.1f} MiB"
        )

    # Slots and lengths are an int, a sequence, or an int32 or int64 tensor [k] on the CPU or on the
    # cache's device. Those on a GPU are not read back: a wrong one is set aside and flagged.

    def reset(self, slots: Ints | None = None) -> None:
        """Empty these slots, counters included; None is all of them.

        Raises ValueError for a slot out of range; on the GPU it is ignored and `check` raises.
        """
        if slots is None:
            which = torch.ones(self.num_slots, dtype=torch.bool, device=self.device)
        else:
            which = self._mask(self._slots("slots", slots, distinct=False)[0])
        self._empty(which)

    def fork(self, src: Ints, dst: Ints, request_ids: Ints | None = None) -> None:
        """Copy slot `src[i]` over slot `dst[i]`: beam search, parallel sampling, slots that swap.

        All of `src` is read before any of `dst` is written, so a permutation is fine. The counters
        of `dst` start at zero. A copy belongs to the request `request_ids[i]`; with None to the one
        of its source, so that a fork which goes on under an id of its own must name it here.

        Raises ValueError for slots out of range, a `dst` that occurs twice, different numbers of
        them, or a negative id. On the GPU such a `dst` is emptied, and `check` raises; ids are not
        looked at there.
        """
        source, source_valid = self._slots("src", src, distinct=False)
        target, target_valid = self._slots("dst", dst, distinct=True)
        if len(source) != len(target):
            raise ValueError(f"dst has {len(target)} slots, must have {len(source)} as src")
        ids = None if request_ids is None else self._request_ids(request_ids, len(target))
        if len(source) == 0:
            return
        valid = source_valid & target_valid
        pairs = valid_pairs(valid)
        some = valid.any()
        read, write = (slots.take(pairs).where(some, 0) for slots in (source, target))
        self.ring.index_copy_(0, write, self.ring.index_select(0, read))
        if ids is not None:
            ids = ids.take(pairs).where(some, self.slot_request.index_select(0, write))
            self.slot_request.index_copy_(0, write, ids)
        self.counters.masked_fill_(self._mask(target, valid)[:, None], 0)
        self._empty(self._mask(target, ~valid))

    def truncate(self, slots: Ints, seq_lens: Ints) -> None:
        """Drop the entries at positions from `seq_lens[i]` on of slot `slots[i]`: rejected drafts.

        The next decode step of that slot is the one with seq_len `seq_lens[i] + 1`. Entries that
        the dropped ones had overwritten do not come back: the ring has fewer for a while. A length
        beyond the slot's end drops nothing.

        Raises ValueError for slots out of range or given twice, and for negative lengths. On the
        GPU `check` raises: a slot out of range is ignored, of one given twice the shorter length
        counts, a negative length drops everything.
        """
        index, _ = self._slots("slots", slots, distinct=True)
        lens = ints("seq_lens", seq_lens, self.device).to(self.device)
        if len(lens) != len(index):
            raise ValueError(f"seq_lens has {len(lens)} lengths, must have {len(index)} as slots")
        untouched = torch.iinfo(torch.int64).max
        limit = torch.full((self.num_slots + 1,), untouched, dtype=torch.int64, device=self.device)
        limit = limit.scatter_reduce_(0, index, lens, "amin")[: self.num_slots]
        wrong = limit < 0
        if self.device.type == "cpu":
            for slot in wrong.nonzero().flatten().tolist():
                raise ValueError(
                    f"seq_lens for slot {slot} is {int(limit[slot])}, must not be negative"
                )
        self._flag(wrong, ERROR_SEQ_LENS)
        limit = limit.clamp(0, INT32_MAX).to(torch.int32)
        for bound in (self.slot_end, self.slot_reach):
            bound.copy_(torch.minimum(bound, limit))
        self.ring_position.masked_fill_(self.ring_position >= limit[:, None, None], NO_POSITION)

    def export_slots(self, slots: Ints, *, pin_memory: bool = False) -> SlotState:
        """Copy slots to host memory, counters included: a request that is swapped out.

        The slots stay as they are; `reset` frees them for others. With `pin_memory` a cache on a
        GPU copies into page-locked memory and does not wait: the copies are in the current stream,
        where `import_slots` may follow at once, and anybody else must wait for it first.

        Raises ValueError for slots out of range; on the GPU such a one is exported as empty and
        `check` raises.
        """
        index, valid = self._slots("slots", slots, distinct=False)
        rows = self.ring.index_select(0, index.where(valid, 0))
        pin_memory = pin_memory and self.device.type != "cpu"
        if self.device.type != "cpu":
            rows.masked_fill_(~valid[:, None], 0)  # which is an empty slot, too
        host = torch.empty_like(rows, device="cpu", pin_memory=pin_memory)
        return SlotState(Form.of(self), host.copy_(rows, non_blocking=pin_memory))

    def import_slots(self, slots: Ints, state: SlotState) -> None:
        """Put the exported slot `i` of `state` in the place of slot `slots[i]`.

        The request goes on as if it had never been away, in any slot, in this cache or in another
        of the same shape, entries, band, anchors and granularity. It keeps its request id.

        Raises ValueError for slots out of range or given twice, a state of another number of slots
        or from a cache of another form. On the GPU a slot out of range is ignored and one given
        twice is emptied, and `check` raises.
        """
        check_type("state", state, SlotState)
        index, valid = self._slots("slots", slots, distinct=True)
        if len(index) != len(state):
            raise ValueError(f"state has {len(state)} slots, must have {len(index)} as slots")
        state.check_form(self)
        if len(index) == 0:
            return
        pairs, some = valid_pairs(valid), valid.any()
        slot = index.take(pairs).where(some, 0)
        given = state.ring.to(self.device, non_blocking=True).index_select(0, pairs)
        if self.device.type != "cpu":
            given = given.where(some, self.ring.index_select(0, slot))
        self.ring.index_copy_(0, slot, given)
        self._empty(self._mask(index, ~valid))

    def stats(self) -> ReuseStats:
        """What reuse has saved so far, in all and per slot. Waits for the device.

        The counters of a slot run from its last `reset`, or from the `fork` that made it.
        """
        return ReuseStats(self.counters.to("cpu", copy=True), self.num_qo_heads, self.num_kv_heads)

    def audit(self, every: int | None = 1000) -> None:
        """From now on compute one decode step in `every` of each request exactly as well.

        `audited` tells by how much the outputs differed. It costs `1 / every` of exact decode
        attention, and on a GPU some small launches at every step; a CUDA graph has to be captured
        after this call. The sums begin anew; None ends it.

        Raises ValueError or TypeError if `every` is not an int of at least 1.
        """
        self.auditor = None if every is None else Audit(every, self.num_qo_heads, self.device)

    def audited(self) -> AuditReport:
        """The errors that the audit has seen since `audit`. Waits for the device.

        Raises ValueError without an audit.
        """
        if self.auditor is None:
            raise ValueError("no audit is on: call audit(every=...) first")
        return self.auditor.report()

    def check(self) -> None:
        """Raise ValueError if a call since the last check was given bad values on the GPU.

        Values that live on a GPU (lengths, page ids, slots) are checked there, without waiting:
        the kernels answer NaN for such a request, touch nothing outside their tensors and set a
        flag, which this method reads (waiting for the device) and clears.
        """
        flag = int(self.error_flag.item())
        if flag:
            self.error_flag.zero_()
            raise ValueError("; ".join(text for bit, text in ERRORS.items() if flag & bit))

    def _empty(self, which: Tensor) -> None:
        """Empty the slots of a mask `[N]`: nothing that their rings hold counts any more."""
        self.ring_stored.masked_fill_(which[:, None], 0)
        self.ring_tau.masked_fill_(which[:, None], 0)
        self.ring_missed.masked_fill_(which[:, None], 0)
        self.slot_end.masked_fill_(which, 0)
        self.slot_reach.masked_fill_(which, 0)
        self.slot_request.masked_fill_(which, NO_REQUEST)
        self.counters.masked_fill_(which[:, None], 0)

    def _mask(self, index: Tensor, where: Tensor | None = None) -> Tensor:
        """Mask `[N]` of the slots that `_slots` gave; of those only the ones `where`."""
        if where is not None:
            index = index.where(where, self.num_slots)
        mask = torch.zeros(self.num_slots + 1, dtype=torch.bool, device=self.device)
        return mask.index_fill_(0, index, True)[: self.num_slots]

    def _flag(self, wrong: Tensor, bit: int) -> None:
        self.error_flag.bitwise_or_(wrong.any().to(torch.int32) * bit)

    def _slots(self, name: str, slots: Ints, *, distinct: bool) -> tuple[Tensor, Tensor]:
        """Slots int64 `[k]` on the device, and which of them are valid (in range, not given twice).

        One that is out of range has become num_slots, which is nobody's.
        """
        given = ints(name, slots, self.device)
        if given.device.type == "cpu":
            seen: set[int] = set()
            for slot in given.tolist():
                check_int(name, slot, low=0, high=self.num_slots - 1)
                if distinct and slot in seen:
                    raise ValueError(f"{name} holds {slot} twice, must name every slot once")
                seen.add(slot)
            index = given.to(self.device)
            return index, torch.ones_like(index, dtype=torch.bool)
        index, valid = valid_slots(given, self.num_slots, distinct=distinct)
        self._flag(~valid, ERROR_SLOTS)
        return index, valid

    def _request_ids(self, request_ids: Ints, count: int) -> Tensor:
        """Ids int64 `[count]` on the device; not negative, where that can be seen."""
        ids = ints("request_ids", request_ids, self.device, high=torch.iinfo(torch.int64).max)
        if len(ids) != count:
            raise ValueError(f"request_ids has {len(ids)} ids, must have {count} as dst")
        if ids.device.type == "cpu":
            for i in (ids < 0).nonzero().flatten().tolist():
                raise ValueError(f"request_ids[{i}] is {int(ids[i])}, must not be negative")
        return ids.to(self.device)

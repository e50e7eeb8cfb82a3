"""Where the tokens of a batch lie in a dense KV store, as told by the attention mask."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .support import Refusal


class RequestLayout:
    """Paging of a dense `[batch, max_length, ...]` KV store whose prompts may be left-padded.

    Row b of the store holds `padding[b]` columns of padding and then the tokens of request b.
    mac_attn counts positions from a request's first token, so that padding is neither read nor part
    of a history; the store itself keeps the padded columns that transformers' masks refer to. One
    object serves all layers.

    The model may have rotated queries by other positions than these (its `position_ids` may count
    the padding). If both count up by one, all queries of a request come back turned by one constant
    angle, and neither their distances nor their lengths change: matches are the same.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.padding: list[int] = []
        self._block_tables: dict[torch.device, Tensor] = {}
        self._seq_lens: dict[torch.device, tuple[int, Tensor]] = {}
        self._checked: tuple[weakref.ref[Tensor], int] | None = None  # (mask, length)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": None}  # a weak reference has no place in a pickle

    def set_padding(self, padding: list[int]) -> None:
        """Set the left padding of every request, in columns."""
        if padding != self.padding:
            self.padding = padding
            self._block_tables.clear()
            self._seq_lens.clear()
        # A mask object is trusted for the padding that it was checked against, no longer.
        self._checked = None

    @property
    def is_padded(self) -> bool:
        return any(self.padding)

    def observe(self, mask: Tensor | None, batch: int, new: int, length: int) -> None:
        """Learn the padding from a mask and insist that the mask says nothing else.

        Args:
            mask: bool or additive float `[batch or 1, 1, new, length]`; None is plain causal.
            batch: requests in this forward.
            new: queries of this forward, the last `new` of `length` columns.
            length: columns in use, the new ones included.
        Raises:
            ValueError: for anything but causal attention to a left-padded prompt.
        """
        # Every layer of a forward gets the same mask object: look at it once.
        if self._checked is not None and mask is not None:
            checked, checked_length = self._checked
            if checked() is mask and checked_length == length:
                return
        padding = [0] * batch if mask is None else _left_padding(mask, batch, new, length)
        if padding != self.padding:
            before = length - new
            known = self.padding or [before] * batch
            # A request without a single real token so far may still turn out to be padded further.
            if any(old < before and old != now for old, now in zip(known, padding, strict=True)):
                raise Refusal(
                    f"attention_mask: left padding per request is {padding}, but the {before} "
                    f"tokens in the MacCache came with {known}; pass the same mask at every call"
                )
            self.set_padding(padding)
        self._checked = None if mask is None else (weakref.ref(mask), length)

    def lengths(self, length: int) -> list[int]:
        """Real tokens of each request when `length` columns are in use."""
        return [max(0, length - padding) for padding in self.padding]

    def seq_lens(self, length: int, device: torch.device) -> Tensor:
        """`lengths` as int32 `[batch]`; the layers of a step share one tensor."""
        cached = self._seq_lens.get(device)
        if cached is None or cached[0] != length:
            if self.is_padded:
                lens = torch.tensor(self.lengths(length), dtype=torch.int32, device=device)
            else:  # a fill, where a tensor from a list would be a copy to the device
                lens = torch.full((len(self.padding),), length, dtype=torch.int32, device=device)
            self._seq_lens[device] = cached = (length, lens)
        return cached[1]

    def block_table(self, device: torch.device) -> Tensor:
        """Block table int32 of the store: one page per request, or one page per token if padded.

        `[batch, 1]` over pages of `max_length` tokens; padded `[batch, max_length]` over pages of
        one token, so that a request may begin at any column.
        """
        table = self._block_tables.get(device)
        if table is None:
            table = torch.arange(len(self.padding), device=device)[:, None]
            if self.is_padded:
                columns = torch.arange(self.max_length, device=device)
                columns = columns + torch.tensor(self.padding, device=device)[:, None]
                # Behind a request's last token the table is never read, but its ids must exist.
                table = table * self.max_length + columns.clamp_(max=self.max_length - 1)
            self._block_tables[device] = table = table.to(torch.int32)
        return table

    def pages(self, store: Tensor) -> Tensor:
        """The dense store `[batch, max_length, Hkv, D]` as the pages that `block_table` names."""
        return store.flatten(0, 1).unsqueeze(1) if self.is_padded else store


def _left_padding(mask: Tensor, batch: int, new: int, length: int) -> list[int]:
    """Left padding per request of a 4D mask; ValueError if the mask is anything else."""
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (new, length):
        raise Refusal(
            f"attention_mask has shape {tuple(mask.shape)}, must be [{batch}, 1, {new}, {length}]"
        )
    if mask.dtype == torch.bool:
        visible = mask
        valid = torch.ones((), dtype=torch.bool, device=mask.device)
    else:  # additive: 0 keeps a token, a hugely negative number drops it, anything else is a bias
        visible = mask == 0
        valid = (visible | (mask <= torch.finfo(mask.dtype).min / 2)).all()
    columns = torch.arange(length, device=mask.device)
    rows = columns[length - new :, None]
    padding = length - visible[:, :1, -1:].sum(-1, keepdim=True)  # [batch or 1, 1, 1, 1]
    expected = (columns <= rows) & (columns >= padding)
    # Rows of padding queries are free: mask builders differ in what they write there.
    valid = valid & ((visible == expected) | (rows < padding)).all()
    *counts, ok = torch.cat([padding.flatten(), valid.view(1)]).tolist()
    if not ok:
        raise Refusal(
            "attention_mask: MacCache supports causal attention to left-padded prompts "
            "(padding_side='left'); this mask has right padding, holes, packed sequences or a bias"
        )
    return counts * batch if len(counts) == 1 else counts

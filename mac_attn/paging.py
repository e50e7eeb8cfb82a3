"""Paged KV caches as other libraries lay them out, brought to the form that the kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, INT_DTYPES, check_choice, check_int, check_number, check_tensor

KVCache = Tensor | tuple[Tensor, Tensor]
Scale = Tensor | float | None  # of a float8 cache

_LAYOUTS = ("NHD", "HND")
_NHD = ("num_pages", "page_size", "num_kv_heads", "head_dim")
_HND = ("num_pages", "num_kv_heads", "page_size", "head_dim")


def kv_views(kv_cache: KVCache, kv_layout: str = "NHD") -> tuple[Tensor, Tensor]:
    """The keys and the values of a paged cache as views, whatever its layout. Copies nothing.

    Args:
        kv_cache: a pair (k_cache, v_cache), each [num_pages, page_size, num_kv_heads, head_dim] for
            kv_layout "NHD" or [num_pages, num_kv_heads, page_size, head_dim] for "HND", or one
            tensor with the pair in dimension 1. The last dimension must be contiguous. Of a pair
            that of v_cache may be less than head_dim.
        kv_layout: "NHD" or "HND".

    Returns:
        (k, v), both [num_pages, page_size, num_kv_heads, head_dim], or v with fewer in the last
        dimension, with strides of any kind but in that.

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride does not fit.
    """
    check_choice("kv_layout", kv_layout, _LAYOUTS)
    shape = _NHD if kv_layout == "NHD" else _HND
    if isinstance(kv_cache, Tensor):
        check_tensor("kv_cache", kv_cache, shape=(shape[0], 2, *shape[1:]))
        k, v = kv_cache.unbind(1)
    elif isinstance(kv_cache, (tuple, list)) and len(kv_cache) == 2:
        k, v = kv_cache
    else:
        size = f" of {len(kv_cache)}" if isinstance(kv_cache, (tuple, list)) else ""
        raise TypeError(
            f"kv_cache is a {type(kv_cache).__name__}{size}, must be a tensor or a pair of tensors"
        )
    check_tensor("k_cache", k, shape=shape, rows=True)
    check_values("v_cache", v, "k_cache", k)
    if kv_layout == "HND":
        return k.transpose(1, 2), v.transpose(1, 2)
    return k, v


def check_values(name: str, v: Tensor, name_of_k: str, k: Tensor) -> None:
    """Values of the shape of keys, but for rows that may be shorter."""
    shape = (*k.shape[:-1], "head_dim_v")
    check_tensor(name, v, shape=shape, dtype=k.dtype, device=k.device, rows=True)
    if v.size(-1) > k.size(-1):
        raise ValueError(
            f"{name} has rows of {v.size(-1)}, must have at most those of {name_of_k}, {k.size(-1)}"
        )


def kv_arguments(kv_cache: KVCache, kv_layout: str) -> tuple[Tensor, Tensor | None, bool]:
    """The cache as the decode ops take it, and check it: k, v or None, whether it is "HND"."""
    if kv_layout not in _LAYOUTS:
        check_choice("kv_layout", kv_layout, _LAYOUTS)
    if isinstance(kv_cache, Tensor):
        return kv_cache, None, kv_layout == "HND"
    k, v = kv_cache
    if v is None:  # of a pair; the ops would take `k` for both
        check_tensor("v_cache", v)
    return k, v, kv_layout == "HND"


def to_float8(x: Tensor, scale: Tensor | float) -> Tensor:
    """Keys or values as the numbers of a float8 cache: x / scale, rounded to float8_e4m3fn.

    What exceeds its largest number, 448, becomes that, as in vLLM and FlashInfer; what is not
    finite becomes NaN, so that it shows.

    Args:
        x: [..., num_kv_heads, head_dim], any float dtype.
        scale: float32, [] or [1], or [num_kv_heads]; or a number.

    Returns:
        float8_e4m3fn of x's shape. `decode` takes the scale as `k_scale` or `v_scale`.

    Raises:
        ValueError, TypeError: x is no tensor, or a shape, dtype or device does not fit.
    """
    check_tensor("x", x, dtype=FLOAT_DTYPES)
    if isinstance(scale, Tensor):
        check_tensor("scale", scale, dtype=torch.float32, device=x.device)
        if scale.dim() > 1 or (scale.numel() != 1 and scale.shape != x.shape[-2:-1]):
            raise ValueError(
                f"scale has shape {list(scale.shape)}, must be [], [1] or [num_kv_heads], "
                f"{list(x.shape[-2:-1])}"
            )
        scale = scale.reshape(-1, 1)
    else:
        check_number("scale", scale, low=torch.finfo(torch.float32).tiny)
    most = torch.finfo(torch.float8_e4m3fn).max
    numbers = (x.float() / scale).clamp(-most, most)
    return numbers.where(x.isfinite(), torch.nan).to(torch.float8_e4m3fn)


def kv_scales(k_scale: Scale, v_scale: Scale, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The scales of a float8 cache as tensors, which the ops check further.

    Raises ValueError or TypeError for a number that is not finite and above 0, and for a tensor of
    another dtype than float32 or on another device than q.
    """
    if k_scale is None and v_scale is None:
        return None, None
    return _scale("k_scale", k_scale, q), _scale("v_scale", v_scale, q)


def _scale(name: str, scale: Scale, q: Tensor) -> Tensor | None:
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        check_tensor(name, scale, dtype=torch.float32, device=q.device)
        return scale
    check_number(name, scale, low=torch.finfo(torch.float32).tiny)
    return torch.full((), scale, dtype=torch.float32, device=q.device)


def from_flashinfer(
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    page_size: int,
    *,
    max_pages: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn FlashInfer's ragged page table into a block table and lengths.

    Args:
        indptr: [B + 1] int32 or int64, where the pages of each request begin in `indices`, from 0.
        indices: [total pages] int32 or int64, page ids.
        last_page_len: [B] int32 or int64, tokens in the last page, 1 to page_size. A request
            without pages has length 0, whatever stands here.
        page_size: tokens per page.
        max_pages: columns of the block table. None is the most pages of any request, which waits
            for the device to learn it.

    Returns:
        (block_table [B, max_pages] int32, 0 beyond a request's pages; seq_lens [B] int32).

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; on the CPU also if the values
            of indptr or last_page_len are out of range or max_pages is too small.
    """
    page_size = check_int("page_size", page_size, low=1)
    check_tensor("indptr", indptr, shape=("batch + 1",), dtype=INT_DTYPES)
    device, batch = indptr.device, len(indptr) - 1
    if batch < 0:
        raise ValueError("indptr has shape [0], must be [batch + 1]")
    check_tensor("indices", indices, shape=("pages",), dtype=INT_DTYPES, device=device)
    check_tensor("last_page_len", last_page_len, (batch,), dtype=INT_DTYPES, device=device)
    indptr = indptr.long()
    pages = indptr.diff()
    if device.type == "cpu":
        _check_flashinfer(indptr, indices, last_page_len, page_size)
    most = int(pages.max()) if batch and (max_pages is None or device.type == "cpu") else 0
    if max_pages is None:
        max_pages = most
    max_pages = check_int("max_pages", max_pages, low=most)

    # A sentinel of 0: `indices` may be empty, and places beyond a request's pages hold 0.
    padded = torch.nn.functional.pad(indices.to(torch.int32), (0, 1))
    column = torch.arange(max_pages, device=device)
    at = torch.where(column < pages[:, None], indptr[:-1, None] + column, len(indices))
    # The clamp keeps a wrong indptr on the GPU, which nobody checks, inside `indices`.
    block_table = padded[at.clamp(0, len(indices))]
    seq_lens = torch.where(pages > 0, (pages - 1) * page_size + last_page_len, 0)
    return block_table, seq_lens.to(torch.int32)


def dense_as_pages(k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """See a dense KV cache as a paged one with a page per request. Copies nothing.

    Args:
        k, v: [B, L, num_kv_heads, head_dim] with any strides but 1 in the last dimension, of which
            v may have less. A cache [B, num_kv_heads, L, head_dim] is `k.transpose(1, 2)`.

    Returns:
        ((k, v), block_table [B, 1] int32), for kv_layout "NHD": the page size is L.

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride does not fit.
    """
    check_tensor("k", k, shape=("batch", "length", "num_kv_heads", "head_dim"), rows=True)
    check_values("v", v, "k", k)
    return (k, v), torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]


def _check_flashinfer(
    indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int
) -> None:
    pages = indptr.diff()
    if int(indptr[0]) != 0 or bool((pages < 0).any()) or int(indptr[-1]) > len(indices):
        raise ValueError(
            f"indptr is {indptr.tolist()}, must rise from 0 to at most {len(indices)}, "
            "the length of indices"
        )
    wrong = (pages > 0) & ((last_page_len < 1) | (last_page_len > page_size))
    for b in wrong.nonzero().flatten().tolist():
        raise ValueError(
            f"last_page_len[{b}] is {int(last_page_len[b])}, must be from 1 to {page_size}"
        )

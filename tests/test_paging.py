"""KV caches as other libraries lay them out: views of pairs, FlashInfer's tables, dense caches."""

from __future__ import annotations

import pytest
import torch
from cases import make_kv

from mac_attn import dense_as_pages, from_flashinfer
from mac_attn.paging import kv_views

SIZES = dict(batch=2, length=21, num_kv_heads=3, head_dim=16, page_size=4)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_views_show_every_token_in_place(layout, combined, strided, device):
    kv = make_kv(1, **SIZES, layout=layout, combined=combined, strided=strided, device=device)
    kv.write([0, 0], [21, 21])
    views = kv_views(kv.cache, layout)
    for view, tokens in zip(views, (kv.k, kv.v), strict=True):
        assert view.shape[1:] == (4, 3, 16) and view.stride(-1) == 1
        assert torch.equal(view[kv.pages].flatten(1, 2)[:, :21], tokens)
    base = kv.cache if combined else kv.cache[0]
    assert views[0].untyped_storage().data_ptr() == base.untyped_storage().data_ptr()  # no copy


def test_list_is_a_pair():
    k, v = torch.randn(2, 5, 4, 3, 16).unbind(0)
    assert kv_views([k, v], "NHD")[1] is v  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "message", "cache", "layout"),
    [
        (
            ValueError,
            "kv_layout is 'DHN', must be 'NHD' or 'HND'",
            torch.rand(5, 2, 4, 3, 16),
            "DHN",
        ),
        (TypeError, "kv_layout is None", torch.rand(5, 2, 4, 3, 16), None),
        (TypeError, "kv_cache is a NoneType", None, "NHD"),
        (TypeError, "kv_cache is a tuple of 3", (torch.rand(5, 4, 3, 16),) * 3, "NHD"),
        (ValueError, r"kv_cache has shape \[2, 5, 4, 3, 16\]", torch.rand(2, 5, 4, 3, 16), "NHD"),
        (ValueError, r"k_cache has shape \[4, 3, 16\]", (torch.rand(4, 3, 16),) * 2, "NHD"),
        (TypeError, "v_cache is None", (torch.rand(5, 4, 3, 16), None), "NHD"),
        (
            ValueError,
            r"v_cache has shape \[5, 4, 2, 16\], must be \[5, 4, 3, head_dim_v\]",
            (torch.rand(5, 4, 3, 16), torch.rand(5, 4, 2, 16)),
            "HND",
        ),
        (
            ValueError,
            "v_cache has rows of 24, must have at most those of k_cache, 16",
            (torch.rand(5, 4, 3, 16), torch.rand(5, 4, 3, 24)),
            "HND",
        ),
        (
            TypeError,
            "v_cache is torch.float16, must be torch.float32",
            (torch.rand(5, 4, 3, 16), torch.rand(5, 4, 3, 16).half()),
            "NHD",
        ),
        (
            ValueError,
            "k_cache has strides .* must have 1 in the last dimension",
            (torch.rand(5, 4, 3, 32)[..., ::2], torch.rand(5, 4, 3, 16)),
            "NHD",
        ),
    ],
)
def test_refuses_other_caches(error, message, cache, layout):
    with pytest.raises(error, match=message):
        kv_views(cache, layout)


def flashinfer_tables(lens: list[int], page_size: int):
    """indptr, indices, last_page_len of requests with these lengths, in shuffled pages."""
    pages = [-(-n // page_size) for n in lens]
    indptr = torch.tensor([0, *pages]).cumsum(0)
    indices = torch.randperm(sum(pages) + 5)[: sum(pages)] + 1  # page 0 is nobody's
    last = torch.tensor(
        [n - (p - 1) * page_size if p else 0 for n, p in zip(lens, pages, strict=True)]
    )
    return indptr, indices, last


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("max_pages", [None, 400])
@pytest.mark.parametrize("lens", [[37, 1, 0, 128, 300], [0, 0], [], [16]])
def test_flashinfer_tables(lens, page_size, max_pages, dtype, device):
    indptr, indices, last = flashinfer_tables(lens, page_size)
    tables = [t.to(device, dtype) for t in (indptr, indices, last)]
    block_table, seq_lens = from_flashinfer(*tables, page_size, max_pages=max_pages)
    assert block_table.dtype == seq_lens.dtype == torch.int32
    assert block_table.device == seq_lens.device == tables[0].device
    assert seq_lens.tolist() == lens
    width = max([-(-n // page_size) for n in lens], default=0) if max_pages is None else max_pages
    assert block_table.shape == (len(lens), width)
    for b, row in enumerate(block_table.tolist()):
        own = indices[int(indptr[b]) : int(indptr[b + 1])].tolist()
        assert row == own + [0] * (width - len(own))


def test_flashinfer_values_are_checked_on_the_cpu():
    indptr, indices, last = flashinfer_tables([37, 5], 16)
    with pytest.raises(ValueError, match=r"last_page_len\[1\] is 17, must be from 1 to 16"):
        from_flashinfer(indptr, indices, torch.tensor([5, 17]), 16)
    with pytest.raises(ValueError, match=r"last_page_len\[0\] is 0"):
        from_flashinfer(indptr, indices, torch.tensor([0, 5]), 16)
    for wrong in ([1, 3, 4], [0, 3, 2], [0, 3, 5]):
        with pytest.raises(ValueError, match=r"indptr is .* must rise from 0 to at most 4"):
            from_flashinfer(torch.tensor(wrong), indices, last, 16)
    with pytest.raises(ValueError, match="max_pages is 2, must be from 3"):
        from_flashinfer(indptr, indices, last, 16, max_pages=2)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "indptr is torch.float32", dict(indptr=torch.rand(3))),
        (ValueError, r"indptr has shape \[0\]", dict(indptr=torch.arange(0))),
        (ValueError, r"indices has shape \[2, 2\]", dict(indices=torch.arange(4).view(2, 2))),
        (ValueError, r"last_page_len has shape \[3\]", dict(last_page_len=torch.arange(3))),
        (ValueError, "page_size is 0", dict(page_size=0)),
        (TypeError, "page_size is of type float", dict(page_size=16.0)),
    ],
)
def test_flashinfer_refuses_other_tables(error, message, arguments):
    indptr, indices, last = flashinfer_tables([37, 5], 16)
    good = dict(indptr=indptr, indices=indices, last_page_len=last, page_size=16)
    with pytest.raises(error, match=message):
        from_flashinfer(**good | arguments)


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_cache_is_a_page_per_request(transposed, device):
    k, v = torch.randn(2, 3, 50, 4, 16, device=device).unbind(0)
    if transposed:  # [B, Hkv, L, D], as transformers keeps it
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    cache, block_table = dense_as_pages(k, v)
    assert block_table.dtype == torch.int32 and block_table.device == k.device
    assert block_table.tolist() == [[0], [1], [2]]
    for view, tensor in zip(kv_views(cache), (k, v), strict=True):
        assert view.data_ptr() == tensor.data_ptr() and torch.equal(view, tensor)


def test_dense_refuses_other_shapes():
    k = torch.randn(3, 50, 4, 16)
    with pytest.raises(
        ValueError, match=r"v has shape \[3, 9, 4, 16\], must be \[3, 50, 4, head_dim_v"
    ):
        dense_as_pages(k, torch.randn(3, 9, 4, 16))
    with pytest.raises(ValueError, match="v has rows of 24, must have at most those of k, 16"):
        dense_as_pages(k, torch.randn(3, 50, 4, 24))
    with pytest.raises(ValueError, match=r"k has shape \[50, 4, 16\]"):
        dense_as_pages(k[0], k[0])
    with pytest.raises(ValueError, match="k has strides"):
        dense_as_pages(k.transpose(2, 3), k.transpose(2, 3))

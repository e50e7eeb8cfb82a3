"""Fixtures shared by all tests."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch


def _cuda_missing() -> str | None:
    """Why the CUDA tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    from mac_attn import _C

    return None if _C.build_info()["cuda_arches"] else "mac_attn was built without CUDA"


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every backend in turn; the same test must hold on all of them."""
    if request.param == "cuda" and (reason := _cuda_missing()):
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """For what exists on CUDA only, such as graphs."""
    if reason := _cuda_missing():
        pytest.skip(reason)
    return torch.device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-k cuda` selects what exists on CUDA only, too."""
    for item in items:
        if "cuda" in getattr(item, "fixturenames", ()):
            item.extra_keyword_matches.add("cuda")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Skip what the CUDA kernels do not offer, in their own words: odd head sizes, and float32
    where a test's parameters or mark ask for it. Others are to take `plain_dtype`."""
    try:
        return (yield)
    except (TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        asked = [getattr(pyfuncitem, "callspec", None), *pyfuncitem.iter_markers("float32")]
        if reason.endswith(" on CUDA") and ("float32" not in reason or "float32" in str(asked)):
            pytest.skip(reason)
        raise


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """As models are run for inference."""
    with torch.no_grad():
        yield


@pytest.fixture
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of bench/ can be imported."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))

"""Every causal language model of transformers, tiny: attended as by its own attention, or refused.

What becomes of each is listed in docs/transformers.md, and compared with it here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from all_models import TOO_LARGE, names, tiny_causal_model  # noqa: E402
from tiny_models import ALWAYS, NEVER, SMALL  # noqa: E402

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.integrations.transformers import MacCache  # noqa: E402
from mac_attn.integrations.transformers.rotation import cache_name  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_grad")]

PROMPT, STEPS = 40, 8
NO_STEPS = {"cpmant"}  # cannot go on from its own cache with single tokens
DOCS = Path(__file__).parent.parent / "docs" / "transformers.md"
# Of the release that docs/transformers.md was written for; others have other models.
DOCUMENTED = "5.24."


def stepwise(model: Any, ids: Tensor, cache: MacCache | None = None) -> Tensor:
    """Logits of a prompt and of single tokens after it, with this cache or with the model's own."""
    name = cache_name(model.forward)
    logits = []
    for tokens in (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)):
        options = {} if cache is None else {name: cache}
        output = model(input_ids=tokens, use_cache=True, **options)
        logits.append(output.logits)
        if cache is None:
            names = ("cache", "past_key_values", "cache_params", "state", "mems")
            name = next((n for n in names if getattr(output, n, None) is not None), "")
            cache = getattr(output, name, None)
            if cache is None:  # it keeps nothing: all tokens, each time
                return model(input_ids=ids, use_cache=False).logits
    return torch.cat(logits, dim=1)


def refusal(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a function returns, or why it is a ValueError; any other exception is a failure."""
    try:
        return function(), None
    except ValueError as error:
        reason = str(error)
        assert len(reason) > 40, "a reason, and what to do instead"
        return None, reason


def assert_equal_or_refused(function: Callable[[], Tensor], expected: Tensor) -> str | None:
    got, reason = refusal(function)
    if reason is None:
        # Two kernels round differently, and two layers with large weights amplify that.
        assert (got - expected).norm() <= 2e-4 * expected.norm()
    return reason


def outcome(name: str) -> tuple[str, str]:
    """Which list of docs/transformers.md a model is in, and for one that is refused, why."""
    torch.manual_seed(0)
    model = tiny_causal_model(name)
    ids = torch.randint(4, 99, (1, PROMPT + STEPS))
    whole = model(input_ids=ids, use_cache=False).logits
    own = whole if name in NO_STEPS else stepwise(model, ids)

    built = copy.deepcopy(model.config)
    built._attn_implementation = "mac"
    model.set_attn_implementation("mac")
    models = [model]
    with suppress(KeyError):  # of models that look "mac" up in a table of their own
        models.append(type(model)(built).eval())
        models[1].load_state_dict(model.state_dict())
    for one in models:
        assert_equal_or_refused(lambda: one(input_ids=ids, use_cache=False).logits, whole)  # noqa: B023
        if name not in NO_STEPS:
            assert_equal_or_refused(lambda: stepwise(one, ids), own)  # noqa: B023

    def cached(config: ReuseConfig | None, tokens: Tensor = ids) -> tuple[MacCache, Tensor]:
        cache = MacCache(model, max_length=2 * (PROMPT + STEPS), config=config)
        return cache, stepwise(model, tokens, cache)

    reason = assert_equal_or_refused(lambda: cached(None)[1], own)
    if reason is not None:
        refused = refusal(lambda: cached(NEVER))
        assert refused[1] is not None, "refused without reuse, so with it"
        return "refused", reason
    reason = assert_equal_or_refused(lambda: cached(NEVER)[1], own)
    if reason is not None:
        return "exact", reason
    cache, logits = cached(ALWAYS)
    assert logits.isfinite().all()
    reusing = [stats.hit_rate for stats in cache.layer_stats() if stats is not None]
    if not reusing:
        return "SDPA", ""
    assert reusing == [1.0] * len(reusing)  # every layer that has a ring finds what is in it
    # One token again and again has the same query at every position, but for its rotation; unless
    # the model adds something for the position to the token, which none that rotates does.
    cache, _ = cached(ReuseConfig(**SMALL, threshold=1e-3), torch.full_like(ids, 7))
    same = {stats.hit_rate for stats in cache.layer_stats() if stats is not None}
    assert same == {1.0} or not any(cache._rotations.values())
    return ("reuse" if same == {1.0} else "absolute"), ""


def documented() -> dict[str, str]:
    """Model types of docs/transformers.md and the list that each is in."""
    lists = re.findall(r"<!-- (\w+) -->\n(.*?)\n\n", DOCS.read_text() + "\n\n", re.DOTALL)
    return {name: kind for kind, text in lists for name in re.findall(r"`([\w-]+)`", text)}


@pytest.mark.parametrize("name", sorted(set(names()) - set(TOO_LARGE)))
def test_attended_as_by_its_own_attention_or_refused(name: str) -> None:
    kind, _ = outcome(name)
    if transformers.__version__.startswith(DOCUMENTED):
        assert documented()[name] == kind


def test_the_documentation_lists_every_model() -> None:
    if not transformers.__version__.startswith(DOCUMENTED):
        pytest.skip(f"docs/transformers.md is about transformers {DOCUMENTED}x")
    listed = documented()
    assert {name for name in listed if listed[name] == "untried"} == set(TOO_LARGE)
    assert set(listed) == set(names())

"""What "mac" may do for a model: transformers' word on SDPA, and the keywords of an attention call.

"mac" is torch SDPA wherever it is not `mac_attn.decode`. SDPA takes no sparse indices, and swallows
what it does not know, so a model is refused unless transformers itself would give it SDPA, and so
is a keyword unless it is known to change nothing. Sinks, which SDPA does not take either, are done
in sinks.py, for models that are known to have nothing else against SDPA.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Keywords of an attention call that are about something else than which values are mixed how: the
# window is in the mask too, and the rest is what a forward was asked to return or to count.
NEUTRAL = frozenset(
    {
        "sliding_window",
        "position_ids",
        "cache_position",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "logits_to_keep",
        "num_logits_to_keep",
        "num_items_in_batch",
        "deterministic",
    }
)
# Folders of transformers whose models have no SDPA for their sinks alone.
_SINKS_ALONE = ("gpt_oss", "granite_swa", "granitemoe_swa", "flint", "mimo_v2_flash")
_EAGER = "use attn_implementation='eager', with transformers' own cache"


class Refusal(ValueError):
    """What this integration refuses: its message says why and what to do instead."""


_approved: set[tuple[type, type]] = set()


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Refusal for a keyword that SDPA would ignore although it may change the attention."""
    for name, value in kwargs.items():
        if value is not None and name not in NEUTRAL:
            raise Refusal(
                f'attention keyword `{name}`: "mac" is SDPA or mac_attn.decode, and neither takes '
                f"it; {_EAGER}"
            )


def check_module(module: nn.Module) -> None:
    """Refusal for an attention module of a model that transformers gives no SDPA."""
    config = type(getattr(module, "config", None))
    _check(type(module), config, [kind.__module__ for kind in type(module).__mro__])


def check_config(config: Any) -> None:
    """Refusal for the config of a model that transformers gives no SDPA."""
    files = [kind.__module__ for kind in type(config).__mro__]
    files = [file.replace(".configuration_", ".modeling_") for file in files]
    _check(type(config), type(config), files)


def check_model(model: PreTrainedModel) -> None:
    """Refusal for a model that transformers gives no SDPA."""
    if reason := _refusal(type(model).__name__, [type(model)]):
        raise Refusal(reason)


def _check(kind: type, config_class: type, files: list[str]) -> None:
    """Refusal if one of the modeling files that a class descends from says so of its models."""
    if (kind, config_class) not in _approved:
        for file in files:
            if reason := _reason(file, config_class):
                raise Refusal(reason)
        _approved.add((kind, config_class))


def _reason(file: str, config_class: type) -> str | None:
    """Why the models of a modeling file that have this config are refused; None: they are not."""
    fitting = [
        kind
        for kind in vars(sys.modules.get(file, object)).values()
        if isinstance(kind, type)
        and issubclass(kind, PreTrainedModel)
        and kind.__module__ == file
        and issubclass(config_class, kind.config_class or ())
    ]
    return _refusal(fitting[0].__name__, fitting) if fitting else None


def _has_sinks_alone(kind: type) -> bool:
    files = tuple(f"transformers.models.{name}." for name in _SINKS_ALONE)
    return any(parent.__module__.startswith(files) for parent in kind.__mro__)


def _refusal(name: str, models: list[type[PreTrainedModel]]) -> str | None:
    if not any(kind._can_set_attn_implementation() for kind in models):
        return (
            f"{name} does not call its attention through transformers' AttentionInterface, which "
            f'"mac" is made for; {_EAGER}'
        )
    if not any(kind._supports_sdpa or _has_sinks_alone(kind) for kind in models):
        return (
            f"{name} has `_supports_sdpa = False`: its attention is more than SDPA can do (soft "
            f'caps, sparse indices, ...), and "mac" is SDPA or mac_attn.decode; {_EAGER}'
        )
    return None

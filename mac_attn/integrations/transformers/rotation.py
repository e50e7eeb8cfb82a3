"""How each layer of a model rotates its queries, found out by running the model and looking.

A config does not tell: some layers of a model do not rotate, some models rotate the other way
round, or pair dimensions (2i, 2i + 1), or have frequencies for each kind of layer. So every layer
is shown one hidden state at several positions. Its queries then differ by the rotation alone, and
the frequencies are among those of the model's rotary modules.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mac_attn import RotaryEmbedding, rotate, unrotate
from mac_attn.rope import rotary_modules

from .support import Refusal

if TYPE_CHECKING:
    from .cache import MacCache

PROBE_TOKENS = 16
_one_at_a_time = threading.Lock()  # the stance of torch.compiler is the process's
_WAY_OUT = (
    "Give the rotation as `rotary` (a RotaryEmbedding, or one or None for each layer), or use "
    "config=None, which is exact decode attention"
)


class Link:
    """A weak reference that copies share and pickles leave behind."""

    def __init__(self, target: Any) -> None:
        self._target = None if target is None else weakref.ref(target)

    def __call__(self) -> Any:
        return None if self._target is None else self._target()

    def __deepcopy__(self, memo: object) -> Link:
        return self

    def __reduce__(self) -> Any:
        return Link, (None,)


@dataclass
class Rotation:
    """What a rotary module of the model does to the queries of some layers."""

    module: Link
    prefix: str  # of the module's inv_freq: "" or a kind of layer
    interleaved: bool
    reverse: bool  # by -p instead of p
    seen: Tensor  # the module's inv_freq when `embedding` was made
    embedding: RotaryEmbedding

    @property
    def words(self) -> str:
        pairs = "neighbouring dimensions" if self.interleaved else "halves"
        return f"in {pairs}{', backwards' if self.reverse else ''}"

    def changed(self) -> bool:
        """Whether the module has other frequencies than `embedding`."""
        inv_freq = self._inv_freq()
        if inv_freq is self.seen:
            return False
        if torch.equal(inv_freq.to(self.seen), self.seen):
            self.seen = inv_freq
            return False
        return True

    def follow(self) -> None:
        """Take over the module's frequencies."""
        self.seen = self._inv_freq()
        self.embedding = _embedding(self.module(), self.prefix, self.interleaved, self.reverse)

    def _inv_freq(self) -> Tensor:
        module = self.module()
        return self.seen if module is None else getattr(module, f"{self.prefix}inv_freq")


def find_rotations(model: PreTrainedModel, cache: MacCache) -> dict[int, Rotation | None]:
    """The rotation of every layer whose keys reach the attention as they are; None: it has none.

    Runs the model on PROBE_TOKENS tokens with `cache`, which is for this alone.

    Raises:
        ValueError: the model could not be run like that, a layer rotates in no way that is known
            here, or its frequencies change with the length, or are for positions of several kinds.
    """
    candidates, refused = _candidates(model)
    found: dict[int, Rotation | None] = {}
    for index, query in probe_queries(model, cache).items():
        fitting = [c for c in candidates if _fits(query, c.embedding if c else None)]
        if not fitting:
            reason = refused or (
                "its queries depend on the position, and not by a rotation that the model's rotary "
                f"modules ({len(rotary_modules(model))} with `inv_freq`) stand for"
            )
            raise Refusal(f"layer {index} cannot reuse: {reason}. {_WAY_OUT}")
        errors = [_error(query, c.embedding if c else None) for c in fitting]
        found[index] = fitting[errors.index(min(errors))]
    return found


def check_rotations(
    model: PreTrainedModel, cache: MacCache, given: list[RotaryEmbedding | None]
) -> None:
    """ValueError where a rotation that was given is not the layer's, which another is.

    What the probe cannot tell is left to whoever gave them.
    """
    try:
        queries = probe_queries(model, cache)
    except Refusal:
        return
    candidates, _ = _candidates(model)
    for index, query in queries.items():
        if not _fits(query, given[index]):
            for other in candidates:
                if _fits(query, other.embedding if other else None):
                    raise Refusal(
                        f"rotary: layer {index} does not rotate its queries like that, but "
                        f"{other.words if other else 'not at all'}; leave `rotary` out"
                    )


def probe_queries(model: PreTrainedModel, cache: MacCache) -> dict[int, Tensor]:
    """Queries `[T, Hq, D]` of every layer for one hidden state at positions 0 to T - 1."""
    queries: dict[int, Tensor] = {}
    prober = threading.get_ident()

    # In another thread, which may run the same model, torch may not have noted `with_kwargs` yet.
    def one_hidden_state(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs is None or threading.get_ident() != prober:
            return None
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": _same_everywhere(kwargs["hidden_states"])}
        return (_same_everywhere(args[0]), *args[1:]) if args else args, kwargs

    def record(index: int, query: Tensor) -> None:
        queries.setdefault(index, query[0].transpose(0, 1))

    device = next(model.get_input_embeddings().parameters()).device
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.full((1, PROBE_TOKENS), min(3, vocabulary - 1), device=device)
    # A layer index is what a module needs to find its place in a cache.
    hooks = [
        module.register_forward_pre_hook(one_hidden_state, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "layer_idx")
    ]
    name = cache_name(model.forward)
    cache._shared.record = record
    try:
        with _one_at_a_time, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(input_ids=ids, use_cache=True, **{name: cache})
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(
            f"the model was run on {PROBE_TOKENS} tokens, to see how its layers rotate queries, "
            f"and raised {type(error).__name__}: {error}\n{_WAY_OUT}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return queries


def cache_name(function: Any) -> str:
    """The name by which a forward or `generate` takes its cache in this release of transformers."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def _same_everywhere(hidden: Any) -> Any:
    """One random hidden state at every position, in place of `[B, T, C]`."""
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point():
        return hidden
    state = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
    return state.to(hidden.device, hidden.dtype).expand_as(hidden).contiguous()


def _candidates(model: PreTrainedModel) -> tuple[list[Rotation | None], str | None]:
    """Everything that the model's rotary modules could stand for, and why some of it cannot be."""
    candidates: list[Rotation | None] = [None]
    refused = None
    kinds = itertools.product(rotary_modules(model), (False, True), (False, True))
    for (module, prefix), interleaved, reverse in kinds:
        try:
            embedding = _embedding(module, prefix, interleaved, reverse)
        except ValueError as error:
            refused = str(error)
            continue
        seen = getattr(module, f"{prefix}inv_freq")
        candidates.append(Rotation(Link(module), prefix, interleaved, reverse, seen, embedding))
    if dim := getattr(model.config, "rotary_dim", None):
        # GPT-J and CodeGen have a table of sines instead, always of these frequencies.
        inv_freq = 10000 ** (-torch.arange(0, dim, 2) / dim)
        embedding = RotaryEmbedding(inv_freq, interleaved=True)
        candidates.append(Rotation(Link(None), "", True, False, inv_freq, embedding))
    return candidates, refused


def _embedding(module: nn.Module, prefix: str, interleaved: bool, reverse: bool) -> RotaryEmbedding:
    rotary = RotaryEmbedding.of_module(module, prefix, interleaved=interleaved)
    return RotaryEmbedding(-rotary.inv_freq, interleaved, rotary.scale) if reverse else rotary


def _fits(query: Tensor, rotary: RotaryEmbedding | None) -> bool:
    # Half precision rounds a query and its rotation to 2^-8; another rotation is off by 1.
    return _error(query, rotary) <= (1e-3 if query.dtype == torch.float32 else 0.05)


def _error(query: Tensor, rotary: RotaryEmbedding | None) -> float:
    """How far queries `[T, Hq, D]` are from the first one, turned to their positions; relative."""
    if rotary is not None and rotary.dim > query.shape[-1]:
        return torch.inf
    query = query.float()
    expected = query[:1].expand_as(query)
    if rotary is not None:
        rotary = rotary.to(query.device)
        positions = torch.arange(len(query), device=query.device)
        first = unrotate(query[:1], positions[:1], rotary)
        expected = rotate(first.expand_as(query), positions, rotary)
    return float((query - expected).norm() / query.norm())

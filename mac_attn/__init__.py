"""MAC-Attention: decode attention that reuses what a recent, similar query has already attended to.

`decode` is one step: match a recent query, amend what its result gets wrong, complete by
log-sum-exp (arXiv:2604.00235). `ReuseCache` holds the recent queries of one layer, `ReuseConfig`
its options.
"""

from . import _extension  # noqa: F401  (first: it looks at what the others open)
from ._checks import MAX_QUERY_TOKENS
from ._version import __version__
from .audit import AuditReport
from .cache import ReuseCache
from .config import ReuseConfig
from .decode import decode
from .ops import Amended, Matched, amend, complete, match, merge_states
from .paging import dense_as_pages, from_flashinfer, to_float8
from .rope import RotaryEmbedding, rotate, unrotate
from .seed import seed
from .slot_state import SlotState
from .stats import ReuseStats

__all__ = [
    "MAX_QUERY_TOKENS",
    "Amended",
    "AuditReport",
    "Matched",
    "ReuseCache",
    "ReuseConfig",
    "ReuseStats",
    "RotaryEmbedding",
    "SlotState",
    "__version__",
    "amend",
    "complete",
    "decode",
    "dense_as_pages",
    "from_flashinfer",
    "match",
    "merge_states",
    "rotate",
    "seed",
    "to_float8",
    "unrotate",
]

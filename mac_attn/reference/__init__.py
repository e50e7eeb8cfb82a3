"""The mathematics of MAC-Attention in plain float64 PyTorch: the judge of every backend.

Slow and readable on purpose. It shares no code with the kernels or with the rest of the package, so
that an error in them cannot hide here. Paper: MAC-Attention, arXiv:2604.00235 (match, amend,
complete); the sample of old tokens (Duffield, Lund, Thorup, JACM 2007) and the decisions per group
are this project's own.

An attention state over a set of tokens is `(o, lse)`: the softmax-weighted mean of their values and
the natural log of the sum of `exp(logit)`; the empty set is `(0, -inf)`. D is the size of a query
and a key, Dv that of a value, and so of an o. The entry of position c
stands for the old tokens `[0, E(c))`.
"""

from .calls import Step, decode, seed
from .reuse import HeadStep, ReferenceReuse
from .rings import LEAST_REST, Entry, Ring, Slot, hit_state
from .sample import Draw, Sample, draw_sample, first_tau, next_tau, sample_size, uniforms
from .states import attention_logits, attention_state, gather_kv, merge_states

__all__ = [
    "LEAST_REST",
    "Draw",
    "Entry",
    "HeadStep",
    "ReferenceReuse",
    "Ring",
    "Sample",
    "Slot",
    "Step",
    "attention_logits",
    "attention_state",
    "decode",
    "draw_sample",
    "first_tau",
    "gather_kv",
    "merge_states",
    "next_tau",
    "hit_state",
    "sample_size",
    "seed",
    "uniforms",
]

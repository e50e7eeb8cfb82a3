"""A CUDA build imports without a GPU, and every op has a CUDA kernel."""

import torch

import mac_attn
from mac_attn.info import info

OPS = [
    "match",
    "amend",
    "complete",
    "complete_exact",
    "decode_reuse",
    "decode_exact",
    "unrotate",
]

build = info()
if not build["cuda_arches"]:
    raise SystemExit("mac_attn was built without CUDA")
print(f"mac_attn {mac_attn.__version__} for {build['cuda_arches']}, torch {torch.__version__}")
for op in OPS:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mac_attn::{op}", "CUDA"):
        raise SystemExit(f"mac_attn::{op} has no CUDA kernel")
    print(f"mac_attn::{op}: CUDA")

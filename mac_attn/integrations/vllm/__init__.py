"""vLLM: decode with MAC-Attention in an unpatched vLLM server.

    MAC_ATTN_VLLM=1 vllm serve MODEL

vLLM loads `register` through the entry point `vllm.general_plugins` in each of its processes. Off,
it does nothing. On, it puts attention backends in the place of vLLM's own: decode tokens of
decoder-only layers go through `mac_attn.decode` on vLLM's KV pages, prefill and every layer that is
not supported stay with vLLM's. docs/vllm.md has the options, what is supported, and the metrics.

The modules of this package that import vLLM are imported only once the plugin is on.
"""

from .plugin import register

__all__ = ["register"]

"""SGLang: decode with MAC-Attention in an unpatched SGLang server.

    python -m sglang.launch_server --model-path MODEL --decode-attention-backend mac

SGLang loads `register` through the entry point `sglang.srt.plugins` in its processes, before it
reads the command line: it adds the attention backend `mac`. Decode tokens of decoder-only layers
go through `mac_attn.decode` on SGLang's KV pool; prefill and every layer that is not supported stay
with SGLang's own backend. docs/sglang.md has the options and what is supported.

The modules of this package that import SGLang are imported only once it loads the plugin.
"""

from .plugin import NAME, register

__all__ = ["NAME", "register"]

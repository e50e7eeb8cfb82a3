"""`python -m mac_attn.demo`: MAC-Attention on a real model, next to exact attention and SDPA."""

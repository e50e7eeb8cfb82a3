"""Plugs mac_attn into model libraries. Each module imports its library, so import it by name."""

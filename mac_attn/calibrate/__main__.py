"""Calibrate a model on a text: `python -m mac_attn.calibrate OUTPUT.json [--text FILE]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments, calibrate, write the JSON and say what to expect of it."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    import torch

    import mac_attn.integrations.transformers  # noqa: F401  (registers attention "mac")
    from mac_attn.calibrate import calibrate
    from mac_attn.demo import model as models

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, name = models.load(options.model, torch.bfloat16, device)
    text = options.text.read_text() if options.text else models.python_reference()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    ids = ids[:, : options.tokens]
    try:
        found = calibrate(model, ids, target_error=options.target_error, steps=options.steps)
    except ValueError as error:
        sys.exit(f"error: {error}")
    found.save(options.output)
    print(
        f"{name}, {ids.shape[1]} tokens: mean error {found.error:.4f} (target "
        f"{found.target_error}), {found.kv_read_share:.1%} of the KV read -> {options.output}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mac_attn.calibrate")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--text", type=Path, help="a text like those to decode; default: prose")
    parser.add_argument("--tokens", type=int, default=5120, help="of the text")
    parser.add_argument("--steps", type=int, default=512, help="decoded, of the tokens")
    parser.add_argument("--target-error", type=float, default=0.04)
    return parser


if __name__ == "__main__":
    main()

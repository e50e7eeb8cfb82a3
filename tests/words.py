"""A tokenizer for the tests of bench/: a word is a token."""

from __future__ import annotations

import re

import torch


class Words:
    """A tokenizer that takes each word for a token; enough of one for the generators."""

    chat_template = None
    eos_token_id = 100

    class _Encoded:
        def __init__(self, ids, as_tensor):
            self.input_ids = torch.tensor([ids]) if as_tensor else ids

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        words = re.findall(r"\n|[^\s]+", text)
        ids = [sum(word.encode()) % 99 + 1 for word in words]
        return self._Encoded(ids, return_tensors == "pt")

    def decode(self, tokens):
        return " ".join(map(str, tokens))

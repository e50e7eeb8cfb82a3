"""Four real texts that need no download: prose, code, licences and a dialogue.

The first three are parts of every Python installation (their words change a little from version to
version); the dialogue is a chat of the model itself about questions that stand here.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMES = ("prose", "code", "dialogue", "licences")

_MODULES = ("textwrap", "heapq", "shutil", "argparse", "ast", "inspect", "tarfile", "typing")

_QUESTIONS = (
    "I have never grown vegetables before. What should I plant first in a small garden?",
    "How often do I have to water the tomatoes, and how can I tell that they get too much?",
    "My neighbour says that I should not plant beans next to onions. Is that true?",
    "Let us talk about something else. Why does bread rise, and what does the salt do?",
    "Can I bake bread without yeast? Tell me a simple recipe.",
    "The crust of my last loaf was very hard. What did I do wrong?",
    "I would like to learn to play the guitar at forty. Is it too late?",
    "Make me a plan for the first four weeks, with half an hour a day.",
    "Which songs are easy for a beginner, and what makes a song easy?",
    "What is the difference between a violin and a viola?",
    "Tell me a short story about a lighthouse keeper who is afraid of the sea.",
    "Now tell the same story as the sea would tell it.",
    "Explain to my daughter, who is seven, why the moon changes its shape.",
    "She asks why the moon does not fall down. What do I say?",
    "We want to travel by train from Lisbon to Warsaw. What should we see on the way?",
    "My partner gets sick on trains. What helps?",
    "How do I write a letter to my landlord about a broken heating?",
    "Write that letter politely, but make clear that I will not wait for another month.",
    "What are the advantages and disadvantages of working from home?",
    "Write a small Python function that counts the words in a text, and explain it.",
    "Change it so that it ignores punctuation and capital letters.",
    "How does a computer store such a text in its memory?",
    "Give me three arguments for and three against a ban on cars in the centre of a city.",
    "Thank you. Please sum up in a few sentences what we have talked about today.",
    "One more thing: what is a good book about the history of gardens?",
    "And which film should I watch tonight, if I like stories about music?",
)


def token_ids(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int
) -> torch.Tensor:
    """The first `length` tokens of a text, `[1, length]`; ValueError if it has fewer."""
    text = dialogue(model, tokenizer) if name == "dialogue" else _read(name)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"the text {name!r} has {ids.shape[1]} tokens, must have {length}")
    return ids


def _read(name: str) -> str:
    if name == "prose":
        from mac_attn.demo.model import python_reference

        return python_reference()
    if name == "code":
        modules = (importlib.import_module(module) for module in _MODULES)
        return "\n\n".join(inspect.getsource(module) for module in modules)
    if name == "licences":
        return "\n\n".join(_licences())
    raise ValueError(f"text is {name!r}, must be {' or '.join(map(repr, NAMES))}")


def _licences() -> list[str]:
    """Licences of the installed packages, each wording once, in the order of the packages."""
    found = {}
    packages = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions()}
    for _, package in sorted(packages.items()):
        for file in package.files or ():
            path = file.locate()
            if "licen" in file.name.lower() and path.is_file() and path.suffix in ("", ".txt"):
                found[path.read_text(errors="replace")] = None
    return list(found)


@torch.no_grad()
def dialogue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer_tokens: int = 256
) -> str:
    """One chat of all the questions, each answered by the model itself (sampled, fixed seed).

    Every answer is written with its question alone before it, all in one batch: the turns follow
    one another as in a chat, but the model has not read the turns before. On another machine or
    version of torch the answers may be others.
    """
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in _QUESTIONS
    ]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(chats, add_special_tokens=False, padding=True, return_tensors="pt")
    batch = batch.to(model.device)
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    torch.manual_seed(0)
    answers = model.generate(
        **batch, max_new_tokens=answer_tokens, do_sample=True, temperature=0.7, top_p=0.95
    )
    model.set_attn_implementation(before)
    texts = tokenizer.batch_decode(answers[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    turns = []
    for question, answer in zip(_QUESTIONS, texts, strict=True):
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer.strip()})
    return str(tokenizer.apply_chat_template(turns, tokenize=False))

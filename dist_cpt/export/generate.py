"""Continue a prompt with a checkpoint, an adapter folder or any Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_cpt.data.tokenizer import adds_bos, padding_id
from dist_cpt.errors import ConfigError
from dist_cpt.export.checkpoint_model import base_of_language_model, load_fp32
from dist_cpt.export.model_folder import tokenizer_folder, turn_ends


def generate(
    folder: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    top_p: float = 1.0,
    chat: bool = False,
) -> str:
    """The prompt and its continuation; temperature 0 is greedy, top_k 0 and top_p 1 sample from the whole vocabulary.

    The same folder, prompt and seed give the same text. An empty prompt starts a new document. With `chat` the prompt
    is a user's message under the chat template, and only the answer is returned.

    Raises:
        ConfigError: no model, tokenizer or chat template in the folder, a classifier, or numbers out of range.
        CheckpointError: the base is not the one the run had, or weights are pickled.
    """
    if temperature < 0 or top_k < 0 or max_new_tokens < 1 or not 0 < top_p <= 1:
        raise ConfigError(
            f"temperature {temperature} and top_k {top_k} must be at least 0, "
            f"max_new_tokens {max_new_tokens} at least 1, top_p {top_p} above 0 and at most 1"
        )
    if temperature == 0 and (top_k or top_p < 1):
        raise ConfigError("top_k and top_p restrict random sampling", remedy="give a temperature above 0")
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"model folder not found: {folder}", remedy="give a run, a checkpoint or a model folder")
    base = base_of_language_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder, base), trust_remote_code=False)
    model = load_fp32(folder, base)
    if torch.cuda.is_available():
        model = model.to(device="cuda", dtype=torch.bfloat16)
    ids = _chat_ids(tokenizer, prompt) if chat else prompt_ids(tokenizer, prompt)
    input_ids = torch.tensor([ids], device=model.device)
    require_positions(model, input_ids.shape[1], max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    ends = [tokenizer.eos_token_id, *(turn_ends(tokenizer) if chat else [])]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding_id(tokenizer),
            eos_token_id=[end for end in ends if end is not None],
            **sampling,
        )
    tokens = output[0, input_ids.shape[1] :] if chat else output[0]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def require_positions(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse more tokens than a learned table of positions has rows; rotary positions have no limit."""
    tables = [m for name, m in model.named_modules() if name.rpartition(".")[2] in ("wpe", "embed_positions")]
    rows = min((table.num_embeddings for table in tables if isinstance(table, torch.nn.Embedding)), default=None)
    if rows is not None and prompt_tokens + new_tokens > rows:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones exceed the model's {rows} positions",
            remedy=f"use max_new_tokens {rows - prompt_tokens}" if rows > prompt_tokens else "use a shorter prompt",
        )


def _chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except ValueError:
        raise ConfigError("the tokenizer has no chat template", remedy="leave --chat out") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a text that is to be continued; of an empty one what begins a document."""
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers end every text
    if not ids:  # in training a document begins with its bos, or follows the eos of another one
        start = tokenizer.bos_token_id if adds_bos(tokenizer) else tokenizer.eos_token_id
        if start is None:
            raise ConfigError("an empty prompt needs a tokenizer with a bos or eos token", remedy="give a prompt")
        ids = [start]
    return ids

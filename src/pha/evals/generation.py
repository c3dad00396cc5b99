"""Text sampled from a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from pha.evals.loading import LoadedModel
from pha.utils.errors import PHAError


@torch.inference_mode()
def sample(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Continue `prompt`, ending early at an end-of-text token.

    Args:
        loaded: model and tokenizer.
        prompt: any text; empty starts from the end-of-text token.
        max_new_tokens: how many tokens to add at most.
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: of the random choices.

    Returns:
        `prompt`, `text` (the continuation alone), and the settings.

    Raises:
        PHAError: settings out of range.
    """
    if max_new_tokens < 1:
        raise PHAError(f"the number of new tokens is {max_new_tokens}; at least 1")
    if temperature < 0:
        raise PHAError(f"temperature is {temperature}; it must not be negative")
    if not 0 < top_p <= 1:
        raise PHAError(f"top-p is {top_p}; it must be in (0, 1]")
    tokenizer, model = loaded.tokenizer, loaded.model
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    input_ids = torch.tensor([ids], device=model.device)
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=generation
        )
    text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return {
        "prompt": prompt,
        "text": text,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }

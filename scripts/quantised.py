"""Perplexity of a model before and after its weights have 8 bits, by torchao and bitsandbytes.

pip install -c constraints.txt -e '.[ecosystem]'
python scripts/quantised.py runs/x/model stores/x --max-tokens 20000
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from pha.data import TokenStore
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a saved model of ours")
    parser.add_argument("store", type=Path, help="tokens by its tokenizer; the test split is read")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--max-tokens", type=int, help="score the first so many")
    options = parser.parse_args()
    tools = {
        "fp32": None,
        f"torchao {version('torchao')}, int8": TorchAoConfig(Int8WeightOnlyConfig()),
        f"bitsandbytes {version('bitsandbytes')}, 8 bit": BitsAndBytesConfig(load_in_8bit=True),
    }
    protocol = Protocol(options.length, options.length)
    store = TokenStore.open(options.store)
    print("| weights | perplexity | tokens |\n|---|---|---|")
    for name, settings in tools.items():
        model = AutoModelForCausalLM.from_pretrained(
            options.model, quantization_config=settings, device_map="cpu", dtype=torch.float32
        )
        found = evaluate(model, store, "test", protocol, max_tokens=options.max_tokens)
        print(f"| {name} | {found.perplexity:.3f} | {found.tokens:,} |", flush=True)


if __name__ == "__main__":
    main()

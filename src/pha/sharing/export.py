"""A model as a folder to share: weights, configuration, tokenizer and model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import GenerationConfig

from pha.loading import LoadedModel, load_model, model_folder
from pha.results import RunResult
from pha.sharing.card import model_card
from pha.sharing.code import AUTO_MAP, FILE, model_code
from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder
from pha.utils.outputs import claimed, require_folder

CARD = "README.md"

_FILES = {
    CARD,
    FILE,
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
# The tokens around a turn of a conversation, and how ChatML puts them.
_TURN = ("<|im_start|>", "<|im_end|>")
_CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path  # the folder
    results: int  # evaluations on its card
    note: str | None  # why there are none, if so


def export_model(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    license_id: str | None = None,
    datasets: Sequence[str] = (),
    force: bool = False,
) -> Exported:
    """Write a model as a folder that transformers loads, by `import pha` or the code in it.

    Args:
        source: a run, one of its checkpoints, or a saved model.
        out: the folder to write, in one step; its name is the model's.
        dtype: of the weights; decays and mixing stay in fp32.
        license_id: for the card, such as `apache-2.0`.
        datasets: for the card, as the Hub names them.
        force: replace an earlier export.

    Raises:
        PHAError: no model there, a damaged result, or a folder in the way.
    """
    _require_replaceable(out, force)
    with claimed(out):
        result, note = _results_of(source)
        loaded = load_model(source, dtype=dtype)
        card = model_card(
            out.resolve().name,
            loaded.pha.config,
            result,
            {} if loaded.run is None else loaded.run.read_config(),
            no_results=note,
            weights="bf16" if dtype == torch.bfloat16 else "fp32",
            license_id=license_id,
            datasets=datasets,
        )
        _write(loaded, card, model_code(loaded.pha.config), out)
    return Exported(out, 0 if result is None or note else len(result.evaluations), note)


def _results_of(source: Path) -> tuple[RunResult | None, str | None]:
    """The result of the run that a model is from, and why it cannot be given, if so."""
    folder, run = model_folder(source)
    if run is None:
        return None, "This model was exported from a folder outside a training run, so no results."
    if not run.result.is_file():
        return None, "The training run had not finished, so there are no results."
    if folder.resolve() != run.model.resolve():
        return run.read_result(), (
            "The results of the training run are of other weights than these."
        )
    return run.read_result(), None


def _require_replaceable(out: Path, force: bool) -> None:
    require_folder(out, replaced=True)
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not names:
        return
    if not (CARD in names and names <= _FILES):  # a saved model has no card
        raise PHAError(f"{out} is not empty and is no earlier export; name another folder")
    if not force:
        raise PHAError(f"{out} holds an earlier export; give --force to replace it")


def _write(loaded: LoadedModel, card: ModelCard, code: str, out: Path) -> None:
    model, tokenizer = loaded.pha, loaded.tokenizer
    # Padding is masked, so any token will do, and programs ask for one.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"  # the first is saved
    # Where programs cut texts that are too long. Nothing ends there, and so `pha` reads on.
    tokenizer.model_max_length = model.config.longest_trained
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)
    if tokenizer.chat_template is None and set(_TURN) <= set(tokenizer.get_added_vocab()):
        tokenizer.chat_template = _CHAT
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(_TURN[1])]
        model.generation_config.eos_token_id = list(dict.fromkeys(ends))
    model.config.update({"auto_map": AUTO_MAP})
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / FILE).write_text(code, encoding="utf-8")
        (folder / CARD).write_text(card.content, encoding="utf-8")

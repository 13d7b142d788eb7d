"""The model card of an exported trial: README.md with the YAML front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData

from workloads.data.split import EVALUATED_ON
from workloads.models.positions import POSITIONS, max_context_length, original_context_length
from workloads.models.source import ModelSource
from workloads.trained import TrainedTrial
from workloads.wording import METHODS, settings

_IN_4_BITS = (
    "\nIn training the base was in 4 bits (NF4 with double quantisation). Loaded that way (`quantization_config`) the "
    "model is the one that was trained and compared; loaded as above it differs by NF4's rounding."
)
HUB = "hub:"  # begins the identity of a model or data set from the Hugging Face hub


def model_card(trial: TrainedTrial, base: ModelSource, config: Any, *, what: str, step: int, rounding: str) -> str:
    """The card in Markdown: origin and training, perplexities, how to load it, how closely it matches the trial.

    Args:
        config: the exported model's configuration.
        rounding: a sentence on the match, without its full stop.
    """
    name, length = base.location if base.revision else Path(base.name).name, max_context_length(config)
    licence = _licence(base, config)
    metadata = ModelCardData(
        library_name="peft" if what == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "longspan", *(["lora"] if what == "adapter" else [])],
        # Only a model that the hub can link to.
        base_model=base.location if base.revision else None,
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        datasets=_hub_id(trial.data_identity),
    )
    return "\n".join(
        [
            f"---\n{metadata.to_yaml()}\n---",
            f"\n# {name} for {length:,} tokens\n",
            f"{name}, whose original context is {original_context_length(config):,} tokens, made to reach "
            f"{length:,} with longspan, which implements [LongLoRA](https://arxiv.org/abs/2309.12307).\n",
            *_table(_facts(trial, base, config, step), "", ""),
            *_perplexities(trial, step),
            "\n## How to load it\n",
            *_loading(base, what, trial.training.quantization),
            f"\n{_versions(config)}",
            "\n## Exactness\n",
            f"{rounding[0].upper()}{rounding[1:]}.\n",
        ]
    )


def _facts(trial: TrainedTrial, base: ModelSource, config: Any, step: int) -> list[tuple[str, str]]:
    training = trial.training
    shown = settings(training)
    name = base.name if base.revision or base.name.startswith("builtin:") else Path(base.name).name
    if step < training.steps:
        shown["Steps"] = f"{step:,} of {training.steps:,}"
    if "Attention in training" in shown:
        shown["Attention in training"] += "; full attention in evaluation and from here on"
    return [
        ("Base", f"{name} (`{trial.model_identity}`)"),
        ("Positions", f"{POSITIONS[training.positions].label}: `{json.dumps(config.rope_parameters)}`"),
        ("Method", f"{training.method}: {METHODS[training.method]}"),
        *([("Data", f"{_data(trial)} (`{trial.data_identity}`)")] if training.steps else []),
        *shown.items(),
        ("Trial", f"`{trial.folder.resolve().name}`"),
    ]


def _perplexities(trial: TrainedTrial, step: int) -> list[str]:
    events = [event for event in trial.evaluations() if event["step"] in (0, step)]
    if not events:
        return []
    rows = [(f"{e['context_length']:,}", str(e["step"]), f"{e['perplexity']:.3f}") for e in events]
    sft = trial.training.task == "sft"
    rule = (
        "every token of the answers of held-out examples that fit into the given length, full attention"
        if sft
        else "full attention, windows of the given length that neither overlap nor cross documents, every token scored "
        "but a window's first"
    )
    return [
        "\n## Perplexity\n",
        f"On {_held_out(trial)}: {rule}. Step 0 is the model before training.\n",
        *_table(rows, "length" if sft else "window", "step", "perplexity"),
    ]


def _held_out(trial: TrainedTrial) -> str:
    if trial.eval_data is None:
        return f"the held-out part of {_data(trial)}"
    evaluation = trial.data_identity.partition(EVALUATED_ON)[2]
    return f"held-out documents of {_name(trial.eval_data, evaluation)}"


def _data(trial: TrainedTrial) -> str:
    return _name(trial.data, trial.data_identity)


def _name(data: str, identity: str) -> str:
    """The data's name; of local data without its path, which no one else has."""
    return data if data.startswith("builtin:") or _hub_id(identity) else Path(data).name


def _loading(base: ModelSource, what: str, quantization: str) -> list[str]:
    if what == "merged":
        return [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
            "```",
        ]
    where = f'"{base.location}", revision="{base.revision}"' if base.revision else '"BASE_FOLDER"'
    return [
        *([] if base.revision else [_local_base(base)]),
        "Load the base with the configuration in this folder: it holds the extended positions. (Code that loads a base "
        "by its name alone, such as `AutoPeftModelForCausalLM`, takes the base's own configuration and loses the long "
        "context.)\n",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer",
        "",
        'config = AutoConfig.from_pretrained("THIS_FOLDER")',
        f'base = AutoModelForCausalLM.from_pretrained({where}, config=config, dtype="auto")',
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        *([_IN_4_BITS] if quantization == "nf4" else []),
    ]


def _versions(config: Any) -> str:
    """Which versions and programs read the positions as they were trained."""
    rope, length = config.rope_parameters, max_context_length(config)
    sentences = [
        f"Needs transformers 4.57 or newer (written with {transformers.__version__}), where config.json holds the "
        "positions in both forms; older versions may ignore them."
    ]
    if rope["rope_type"] == "linear":
        sentences.append(
            f"`max_position_embeddings` is the length before the factor of {rope['factor']:g}, as vLLM and SGLang read "
            f"it; llama.cpp takes it for the longest context: give it `--override-kv "
            f"{config.model_type}.context_length=int:{length}`."
        )
    if rope["rope_type"] == "dynamic":
        sentences.append(
            "Transformers keeps the frequencies of the longest sequence since the model was loaded: the perplexities "
            "below that length hold for a model freshly loaded. vLLM takes those of the full length for every "
            "sequence, and llama.cpp's converter leaves the positions unextended."
        )
    return " ".join(sentences)


def _local_base(base: ModelSource) -> str:
    if base.name.startswith("builtin:"):
        what = f"The base comes with longspan: BASE_FOLDER is `workloads/builtin/{Path(base.location).name}` in it."
    elif base.is_gguf:
        what = f"The base was a local file, {Path(base.name).name}: BASE_FOLDER is a folder it was converted to."
    else:
        what = f"The base was a local folder, {Path(base.name).name}: BASE_FOLDER is where you have it."
    return (
        f"{what} Its content must be that of the table above. Programs such as `workloads.ask` read the location of "
        "the base from `adapter_config.json` (`base_model_name_or_path`): write your BASE_FOLDER there.\n"
    )


def _licence(base: ModelSource, config: Any) -> dict[str, str]:
    """The licence that the base's card or configuration states, as fields of a card's front matter."""
    fields = ("license", "license_name", "license_link")
    stated = {field: getattr(config, field, None) for field in fields}
    try:
        if base.revision:
            card = HfApi().model_info(base.location, revision=base.revision, timeout=10).card_data
        else:
            card = ModelCard.load(Path(base.location) / "README.md", ignore_metadata_errors=True).data
        stated |= {field: text for field in fields if card and (text := card.get(field))}
    except Exception:  # from the hub's client or a broken card: no licence is stated
        pass
    return {field: text for field, text in stated.items() if isinstance(text, str)}


def _table(rows: Sequence[tuple[str, ...]], *head: str) -> list[str]:
    return [_row(head), _row(("---",) * len(head)), *map(_row, rows)]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _hub_id(identity: str) -> str | None:
    """``org/name`` of ``hub:org/name@commit``, None for what is not from the hub."""
    return identity.removeprefix(HUB).partition("@")[0] if identity.startswith(HUB) else None

"""The same training step with Unsloth; ``benchmarks.training_speed`` starts it.

It runs in a separate process, since Unsloth must be imported before transformers, of which it replaces parts. It loads
only checkpoints, so one of random weights is made and removed again: 13 GB for Llama-2-7B. As its documentation
recommends: ``FastLanguageModel``, its own gradient checkpointing, bfloat16 under autocast; its statistics and the hub
are off. Embeddings and norms train too (``modules_to_save``), in bfloat16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
TRAINED = ("embed_tokens", "input_layernorm", "post_attention_layernorm", "model.norm")


def measure_in_process(context_length: int, warmup: int, steps: int, seconds: float) -> dict[str, Any]:
    """Measures in a new process: ``outcome``; if measured, ``seconds`` of each step, ``peak_gib``, ``reserved_gib``.

    Args:
        seconds: time limit of the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(each) for each in (context_length, warmup, steps, folder)]
        # Unsloth writes files into the folder that it runs in.
        environment = {**os.environ, **OFFLINE, "UNSLOTH_COMPILE_LOCATION": f"{folder}/compiled"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.unsloth_baseline", *arguments],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"outcome": f"stopped after {seconds:.0f} s, its time limit"}
        answer = Path(folder) / "answer.json"
        if answer.exists():
            return json.loads(answer.read_text())
    print(done.stderr, file=sys.stderr)
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return {"outcome": f"its process ended with {done.returncode}: {last[0]}"}


def make_checkpoint(folder: Path) -> None:
    """A folder with random bfloat16 weights of Llama-2-7B's shape and a tokenizer with as many words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from benchmarks.memory import MODELS

    config = MODELS["7B"]
    config.max_position_embeddings = 131_072
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    named = ["<unk>", "<s>", "</s>", "<pad>"]
    words = {word: i for i, word in enumerate(named + [f"w{i}" for i in range(len(named), config.vocab_size)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), named))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def measure(context_length: int, warmup: int, steps: int, folder: Path) -> dict[str, Any]:
    """Measures in this process, in which Unsloth is imported before transformers."""
    from unsloth import FastLanguageModel  # isort: skip
    import torch

    from benchmarks.baselines import users_step
    from benchmarks.timing import GIB, seconds_of

    make_checkpoint(folder)
    try:
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=context_length,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            local_files_only=True,
            use_exact_model_name=True,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=8,
            lora_alpha=16,
            lora_dropout=0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            modules_to_save=list(TRAINED),
            use_gradient_checkpointing="unsloth",
        )
        FastLanguageModel.for_training(model)
        step = users_step(model, context_length, autocast=True)
        device = torch.device("cuda", 0)
        seconds_of(step, device, warmup, 0)
        torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(step, device, 0, steps)
    except torch.OutOfMemoryError as error:
        return {"outcome": "out of memory", "reason": str(error)}
    return {
        "outcome": "measured",
        "seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


if __name__ == "__main__":
    length, warmup, steps, folder = sys.argv[1:]
    answer = measure(int(length), int(warmup), int(steps), Path(folder))
    Path(folder, "answer.json").write_text(json.dumps(answer), encoding="utf-8")

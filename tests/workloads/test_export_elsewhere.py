"""Exports in other loaders: transformers 4 reads the positions, ties and tokenizer that transformers 5 does."""

import json
import os
import subprocess
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import small_model
from workloads.models.positions import extend, max_context_length
from workloads.models.source import ModelSource
from workloads.stock_model import save_merged

TINY = ModelSource.parse("builtin:tiny")
ORIGINAL, CONTEXT = 32, 64
TEXT = "a <mark> in a long context"
KINDS = [("llama", positions) for positions in ("linear", "ntk", "dynamic", "yarn", "llama3")] + [
    ("mistral", "yarn"), ("qwen2", "linear"), ("qwen3", "yarn"), ("gpt_neox", "linear"), ("gemma", "ntk"),
    ("phi3", "ntk"),
]  # fmt: skip

IN_TRANSFORMERS_4 = """
    import json, sys, torch
    from pathlib import Path
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        found = {"tokens": tokenizer(sys.argv[2]).input_ids, "longest": tokenizer.model_max_length, "tied": tied}
        with torch.inference_mode():
            torch.save(model(input_ids=torch.arange(64)[None]).logits, folder / "logits.pt")
        (folder / "found.json").write_text(json.dumps(found))
"""


def export(folder, family="llama", positions="yarn", **overrides):
    model = small_model(
        family, max_position_embeddings=ORIGINAL, vocab_size=264, eos_token_id=256, initializer_range=0.1, **overrides
    )
    if family == "gpt_neox":
        model = small_model(
            family, max_position_embeddings=ORIGINAL, vocab_size=264, eos_token_id=256, initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": 0.5},
        )  # fmt: skip
    extend(model.config, CONTEXT, positions)
    tokenizer = TINY.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    save_merged(model, tokenizer, folder, "float32")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(("family", "positions"), KINDS)
def test_an_export_has_its_positions_in_the_older_form_too(family, positions, tmp_path):
    model = export(tmp_path, family, positions)
    config, rope = json.loads((tmp_path / "config.json").read_text()), model.config.rope_parameters
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    assert {**scaling, "rope_theta": config["rope_theta"]}.items() <= rope.items()
    assert scaling["rope_type"] == rope["rope_type"] and config["torch_dtype"] == "float32"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert 264 > max(tokenizer(TEXT).input_ids) >= 258  # its special token is one
    # vLLM and SGLang multiply it by a linear or dynamic factor, and take YaRN's original length times its factor.
    multiplied = scaling["rope_type"] in ("linear", "dynamic")
    assert config["max_position_embeddings"] * (scaling["factor"] if multiplied else 1) == CONTEXT
    assert max_context_length(model.config) == CONTEXT


@pytest.mark.skipif(
    "LONGSPAN_TRANSFORMERS_4" not in os.environ,
    reason="LONGSPAN_TRANSFORMERS_4 names no Python interpreter with transformers 4 and torch",
)
def test_transformers_4_gives_the_same_logits_and_tokens(tmp_path):
    models = {"-".join(kind): export(tmp_path / "-".join(kind), *kind) for kind in KINDS}
    models["tied"] = export(tmp_path / "tied", tie_word_embeddings=True)
    python = os.environ["LONGSPAN_TRANSFORMERS_4"]
    code = textwrap.dedent(IN_TRANSFORMERS_4)
    subprocess.run([python, "-c", code, str(tmp_path), TEXT], check=True, capture_output=True, timeout=300)
    for name, model in models.items():
        with torch.inference_mode():
            expected = model(input_ids=torch.arange(CONTEXT)[None]).logits
        torch.testing.assert_close(
            torch.load(tmp_path / name / "logits.pt", weights_only=True),
            expected,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        found = json.loads((tmp_path / name / "found.json").read_text())
        assert found["tokens"] == AutoTokenizer.from_pretrained(tmp_path / name)(TEXT).input_ids
        assert found["longest"] == CONTEXT and found["tied"] == model.config.tie_word_embeddings

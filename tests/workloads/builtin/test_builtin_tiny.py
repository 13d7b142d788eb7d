import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workloads.data.stdlib import stdlib_documents

FOLDER = Path(__file__).parents[3] / "workloads" / "builtin" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_folder_stays_small_enough_for_a_package():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10 * 2**20


def test_it_is_a_llama_with_a_short_context_and_halves_to_shift(model):
    config = model.config
    assert config.model_type == "llama"
    assert config.max_position_embeddings == 512
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.num_attention_heads % 2 == 0
    assert not config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (264, 256, 257)


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn x  # ok\r\n", " naïve – 深層学習 🦙", "  two  spaces ,\u00a0.\n\n", "\x00\x7f\ufeff"]
)
def test_one_token_a_byte_without_loss(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer):
    assert tokenizer("a<|endoftext|><|pad|>")["input_ids"] == [97, 256, 257]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (256, 257, None)
    assert tokenizer.decode([97, 256], skip_special_tokens=True) == "a"
    assert len(tokenizer) == 258


def test_it_has_learnt_python_it_has_not_seen(model, tokenizer):
    documents = dict(stdlib_documents("validation"))
    windows = []
    for path in ("subprocess.py", "calendar.py", "html/parser.py", "json/encoder.py"):
        ids = torch.tensor(tokenizer(documents[path][: 6 * 512])["input_ids"])
        windows.append(ids[: len(ids) // 512 * 512].view(-1, 512))
    with torch.no_grad():
        losses = [model(input_ids=rows, labels=rows).loss.item() for rows in torch.cat(windows).split(8)]
    assert math.exp(sum(losses) / len(losses)) < 2.6


def test_it_generates_text(model, tokenizer):
    inputs = tokenizer("import os\nimport ", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 8

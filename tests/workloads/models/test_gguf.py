"""Base models from GGUF files: the weights and tokens of the file, converted once."""

import shutil

import pytest
import torch

from tests.support.gguf_file import TEMPLATE, TOKENS, write_gguf
from tests.support.models import small_llama
from workloads.errors import InputError
from workloads.models.source import ModelSource


@pytest.fixture(scope="module")
def model():
    shape = dict(vocab_size=len(TOKENS), intermediate_size=64, num_key_value_heads=2, max_position_embeddings=128)
    return small_llama(**shape, tie_word_embeddings=True).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "longspan" / "models"


def test_the_model_of_a_gguf_file_is_the_one_that_was_written(model, tmp_path, cache):
    source = ModelSource.parse(str(write_gguf(tmp_path / "model.gguf", model)))
    assert not cache.exists()  # naming it converts nothing
    loaded = source.load(128, "none", torch.float32).eval()
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())
    tokens = torch.arange(100)[None] % len(TOKENS)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    tokenizer = source.tokenizer()
    ids = tokenizer("ab, ü", add_special_tokens=False)["input_ids"]
    assert [TOKENS[i] for i in ids] == ["ab", ",", "Ġ", "Ã", "¼"] and tokenizer.decode(ids) == "ab, ü"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    assert tokenizer.eos_token_id == len(TOKENS) - 1
    assert tokenizer.chat_template == TEMPLATE


def test_a_quantised_file_is_near_and_kept_in_bfloat16(model, tmp_path):
    source = ModelSource.parse(str(write_gguf(tmp_path / "model.gguf", model, quantised=True)))
    tokens = torch.arange(100)[None] % len(TOKENS)
    loaded = source.load(128, "none", torch.float32).eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0.05, atol=0.02)
    for name, p in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], loaded.state_dict()[name].bfloat16().float()), name
        assert (loaded.state_dict()[name] - p).abs().max() < 0.01 * p.abs().max()


def test_it_is_converted_once_and_known_by_its_content(model, tmp_path, cache):
    first = ModelSource.parse(str(write_gguf(tmp_path / "model.gguf", model)))
    folder = first.pretrained
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}
    shutil.copy(tmp_path / "model.gguf", tmp_path / "copy.GGUF")
    again = ModelSource.parse(str(tmp_path / "copy.GGUF"))
    assert again.pretrained == folder and again.identity == first.identity
    assert again.tokenizer_identity == first.tokenizer_identity
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")} == written
    other = ModelSource.parse(str(write_gguf(tmp_path / "other.gguf", model, quantised=True)))
    assert other.identity != first.identity


def test_a_file_that_cannot_be_converted_is_named_once_and_leaves_nothing(model, tmp_path, cache):
    whole = write_gguf(tmp_path / "model.gguf", model).read_bytes()
    path = tmp_path / "broken.gguf"
    for content, says in ((b"not a model", "is no GGUF file"), (whole[: len(whole) // 2], "cannot be read from GGUF")):
        path.write_bytes(content)
        for read in ("config", "tokenizer"):
            with pytest.raises(InputError, match=says) as caught:
                getattr(ModelSource.parse(str(path)), read)()
            assert str(caught.value).count(str(path)) == 1
    assert not [entry for entry in cache.iterdir() if entry.suffix != ".lock"]
    with pytest.raises(InputError, match=r"missing\.gguf' is no file here"):
        ModelSource.parse("missing.gguf")

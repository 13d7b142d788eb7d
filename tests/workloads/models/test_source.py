"""Base models: what each form of name loads, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.models import small_llama
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.positions import original_context_length
from workloads.models.source import ModelSource
from workloads.training.setup import build_model


def test_a_local_copy_is_the_same_model_wherever_it_lies(tmp_path):
    builtin = ModelSource.parse("builtin:tiny")
    for name in ("one", "other"):
        shutil.copytree(builtin.location, tmp_path / name)
    one, other = (ModelSource.parse(str(tmp_path / name)) for name in ("one", "other"))
    assert one.identity == other.identity == builtin.identity
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert ModelSource.parse(str(tmp_path / "other")).identity != builtin.identity
    assert ModelSource.parse(str(tmp_path / "other")).tokenizer_identity == builtin.tokenizer_identity


def test_the_tokenizers_identity_is_of_every_file_that_it_reads(tmp_path):
    builtin, folder = ModelSource.parse("builtin:tiny"), tmp_path / "model"
    shutil.copytree(builtin.location, folder)
    assert ModelSource.parse(str(folder)).tokenizer_identity == builtin.tokenizer_identity

    def read() -> tuple[list[int], str, str]:
        source = ModelSource.parse(str(folder))
        return source.tokenizer()("a stone")["input_ids"], source.tokenizer_identity, source.chat_identity

    tokens, identity, chat = read()
    found = {identity}
    for added in ({"stone": 258}, {"stone": 259}):  # transformers adds it at the next free id
        (folder / "added_tokens.json").write_text(json.dumps(added))
        new_tokens, identity, _ = read()
        found.add(identity)
    assert len(new_tokens) < len(tokens) and len(found) == 3
    (folder / "vocabulary-of-a-new-kind.spm").write_text("x")
    assert read()[1] not in found
    for path in folder.glob("[av]*"):
        path.unlink()
    (folder / "README.md").write_text("A note changes nothing.")
    assert read() == (tokens, builtin.tokenizer_identity, builtin.chat_identity) and chat == builtin.chat_identity
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    assert read()[1:] != (builtin.tokenizer_identity, builtin.chat_identity) and read()[1] == builtin.tokenizer_identity
    (folder / "tokenizer.model").symlink_to("blobs/gone")
    with pytest.raises(InputError, match=r"tokenizer\.model cannot be read .*No such file"):
        read()


def test_a_dead_network_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"'org/name': the model hub does not say.*ConnectError.*the network"):
        ModelSource.parse("org/name")


def test_a_full_commit_is_taken_as_it_is_without_the_hub():
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = ModelSource.parse(f"org/name@{commit}")
    assert (source.location, source.revision) == ("org/name", commit)
    assert source.identity == f"hub:org/name@{commit}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:tinny", "did you mean builtin:tiny"),
        ("./nowhere", "no folder here"),
        ("just-a-name", "org/name"),
        ("x" * 300, "no folder here"),
        ("x" * 300 + ".gguf", "no file here"),
    ],
)
def test_a_name_that_stands_for_nothing(name, message):
    with pytest.raises(InputError, match=message):
        ModelSource.parse(name)


def test_a_folder_without_a_model_or_without_parts_of_it(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        ModelSource.parse(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"\.safetensors"):
        ModelSource.parse(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        ModelSource.parse(str(tmp_path)).tokenizer()


def test_a_model_without_rotary_positions_is_refused_by_name(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"gpt2.*RoPE"):
        original_context_length(ModelSource.parse(str(tmp_path)).config())


def test_pickled_weights_are_never_loaded(tmp_path):
    builtin = ModelSource.parse("builtin:tiny")
    shutil.copytree(builtin.location, tmp_path / "model")
    source = ModelSource.parse(str(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        source.load(512, "none", torch.float32)
    with pytest.raises(InputError, match="safetensors"):
        ModelSource.parse(str(tmp_path / "model"))


@pytest.fixture
def half_precision(tmp_path):
    """A model in float16, so that what is loaded is cast, with tied embeddings."""
    small_llama(tie_word_embeddings=True).half().save_pretrained(tmp_path / "half")
    return ModelSource.parse(str(tmp_path / "half"))


def test_weights_go_to_the_engines_device_as_they_are_read(half_precision):
    """Not to host memory first: `place` finds all of them there."""
    arrived = []

    class Watched(Engine):
        def place(self, model):
            arrived.extend(tensor.device for tensor in (*model.parameters(), *model.buffers()))
            return model

    training = TrainingConfig(
        context_length=64, method="full", group_size=16, steps=1, batch=1, precision="bfloat16", eval_span=64
    )
    build_model(half_precision, training, Watched(torch.device("meta"), "bfloat16"), ExecutionConfig())
    assert arrived and {device.type for device in arrived} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora+", "full"])
def test_a_model_loaded_to_a_gpu_equals_one_that_is_moved_there(half_precision, method):
    class ByHostMemory(Engine):
        home = torch.device("cpu")

    training = TrainingConfig(
        context_length=64, method=method, group_size=16, steps=1, batch=1, precision="bfloat16", eval_span=64
    )
    gpu = torch.device("cuda", 0)
    straight, moved = (
        build_model(half_precision, training, engine(gpu, "bfloat16"), ExecutionConfig())
        for engine in (Engine, ByHostMemory)
    )
    assert {tensor.device for tensor in (*straight.parameters(), *straight.buffers())} == {gpu}
    ours, theirs = (dict((*model.named_parameters(), *model.named_buffers())) for model in (straight, moved))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor.cpu(), theirs[name].cpu()), name
    assert straight.get_input_embeddings().weight is straight.get_output_embeddings().weight

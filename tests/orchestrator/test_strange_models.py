"""Model folders as strangers publish them: each is planned, trained, exported and reloaded, or refused by name first.

"First" means when a sweep is planned, before Ray starts.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator.expansion import expand
from orchestrator.planning.preparation import check_sweep, identify
from orchestrator.records.storage import Storage
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from tests.support.events import emit_to
from tests.support.gguf_file import TOKENS, write_gguf
from tests.support.models import small_llama, small_model
from tests.support.texts import prepare_texts
from tests.support.tokenizers import error_of
from workloads.attention.interface import full_attention
from workloads.config import ExecutionConfig
from workloads.engines.engine import Engine
from workloads.export import export_trial
from workloads.models.source import ModelSource
from workloads.training.loop import Trial
from workloads.training.setup import build_model

TINY = ModelSource.parse("builtin:tiny")
ORIGINAL, CONTEXT = 32, 64


class Folder:
    """A model's folder, and what strangers do to it."""

    def __init__(self, path, family="llama", **overrides):
        shape = dict(
            vocab_size=264, max_position_embeddings=ORIGINAL, pad_token_id=None, eos_token_id=256, initializer_range=0.1
        )
        model = small_llama(num_key_value_heads=2, **{**shape, **overrides}) if family == "llama" else None
        (model or small_model(family, **{**shape, **overrides})).save_pretrained(path)
        TINY.tokenizer().save_pretrained(path)
        self.path, self.weights = path, path / "model.safetensors"

    def json(self, name, **values):
        file = self.path / name
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, **values}))

    def config(self, **values):
        self.json("config.json", **values)

    def rope(self, without=("rope_parameters",), **values):
        """Settings for rotary positions as files before transformers 5 have them."""
        config = json.loads((self.path / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key not in without}
        (self.path / "config.json").write_text(json.dumps({**kept, **values}))

    def tensors(self, change):
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})


def sharded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    folder.weights.unlink()
    model.save_pretrained(folder.path, max_shard_size="40KB")
    assert len(list(folder.path.glob("*.safetensors"))) > 1


def shard_missing(folder):
    sharded(folder)
    next(folder.path.glob("model-00002-*.safetensors")).unlink()


def quantised(**settings):
    return lambda folder: folder.config(quantization_config=settings)


def legacy_rope(mpe=ORIGINAL, theta=10_000.0, **scaling):
    return lambda folder: folder.rope(rope_theta=theta, max_position_embeddings=mpe, rope_scaling=scaling or None)


def current_rope(mpe=ORIGINAL, **parameters):
    """Settings for rotary positions as transformers 5 writes them."""
    rope = {"rope_theta": 10_000.0, **parameters}
    return lambda folder: folder.config(max_position_embeddings=mpe, rope_parameters=rope)


def cut(folder):
    folder.weights.write_bytes(folder.weights.read_bytes()[:-1000])


def point(name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 144080\n"
    return lambda folder: (folder.path / name).write_text(pointer)


def no_end(folder):
    config = json.loads((folder.path / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in config.items() if "eos" not in key}
    (folder.path / "tokenizer_config.json").write_text(json.dumps(kept))
    (folder.path / "special_tokens_map.json").unlink(missing_ok=True)


def own_code(folder):
    folder.config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    (folder.path / "configuration_mine.py").write_text("raise SystemExit('ran')")


def pickled(folder):
    torch.save(load_file(folder.weights), folder.path / "pytorch_model.bin")
    folder.weights.unlink()


def not_finite(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def as_integers(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


def other_output_layer(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def same_output_layer(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


FACTORS = dict(short_factor=[1.0, 1.0, 1.5, 2.0], long_factor=[1.0, 2.0, 3.0, 4.0])
LLAMA3 = dict(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL)
YARN = dict(type="yarn", factor=2.0, original_max_position_embeddings=ORIGINAL)

FEW = {name: factors[:2] for name, factors in FACTORS.items()}
NULL = FACTORS | {"long_factor": [1.0, 2.0, 3.0, 0]}

REFUSED = {
    "LFS pointer for weights": (point("model.safetensors"), r"model\.safetensors is a pointer.*git lfs pull"),
    "LFS pointer for the tokenizer": (point("tokenizer.json"), r"tokenizer\.json is a pointer of Git LFS"),
    "missing shard": (shard_missing, "model-00002-of-"),
    "truncated": (cut, "could not be loaded from its safetensors"),
    "empty weights": (lambda folder: folder.weights.write_bytes(b""), "could not be loaded from its safetensors"),
    "another model's weights": (lambda folder: folder.config(intermediate_size=96), "have another shape"),
    "weights of fewer layers": (lambda folder: folder.config(num_hidden_layers=3), "9 of its weights are not in"),
    "NaN": (lambda folder: folder.tensors(not_finite), r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
    "pickle": (pickled, r"no \.safetensors weights but pytorch_model\.bin"),
    "adapter": (lambda folder: (folder.path / "adapter_config.json").write_text("{}"), "is an adapter"),
    "code of its own": (own_code, r"auto_map.*'mine', which is never run"),
    "unknown kind": (lambda folder: folder.config(model_type="llama9"), "'llama9', which the installed transformers"),
    "no EOS": (no_end, "no end-of-sequence token"),
    "new EOS": (lambda folder: folder.json("tokenizer_config.json", eos_token="<end>"), "lacks its .* token '<end>'"),
    "pad beyond": (lambda folder: folder.config(pad_token_id=264), "pad_token_id is 264.*264 tokens"),
    "bitsandbytes": (quantised(quant_method="bitsandbytes", load_in_4bit=True), r"quantised \(bitsandbytes"),
    "bitsandbytes without its name": (quantised(load_in_4bit=True), r"quantised \(bitsandbytes"),
    "GPTQ": (quantised(quant_method="gptq", bits=4), r"quantised \(GPTQ"),
    "AWQ": (quantised(quant_method="awq", bits=4), r"quantised \(AWQ"),
    "compressed-tensors": (quantised(quant_method="compressed-tensors"), r"quantised \(compressed-tensors"),
    "FP8": (quantised(quant_method="fp8", activation_scheme="dynamic"), r"quantised \(FP8"),
    "mrope": (legacy_rope(type="mrope", mrope_section=[1, 1, 2]), "rotary positions of type 'mrope'"),
    "linear without a factor": (legacy_rope(type="linear"), "linear"),
    "llama3 without its factors": (legacy_rope(rope_type="llama3", factor=2.0), r"config\.json.*low_freq_factor"),
    "theta in words": (legacy_rope(theta="large"), r"rope_theta is 'large'.*a positive number"),
    "theta of 0": (legacy_rope(theta=0), r"rope_theta is 0.*a positive number"),
    "theta beyond a float": (legacy_rope(theta=10**400), r"rope_theta is 1000.*a positive number"),
    "rope settings in words": (lambda folder: folder.rope(rope_scaling="yarn"), "rope_scaling is 'yarn'"),
    "two answers": (
        lambda folder: folder.rope(without=(), rope_scaling={"type": "linear", "factor": 2.0}),
        r"rope_parameters\.rope_type 'default' and rope_scaling\.rope_type 'linear'",
    ),
    "config no JSON": (lambda folder: (folder.path / "config.json").write_text("{,"), r"config\.json cannot be read"),
    "config a list": (lambda folder: (folder.path / "config.json").write_text("[]"), r"config\.json cannot be read"),
    "config deep": (
        lambda folder: (folder.path / "config.json").write_text("[" * 9**6), r"config\.json cannot be read.*Recursion"
    ),
    "heads that do not divide": (lambda folder: folder.config(num_attention_heads=5, head_dim=None), "config"),
    "no heads": (lambda folder: folder.config(num_attention_heads=0, head_dim=None), "config"),
    "no layers": (lambda folder: folder.config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "a billion layers": (lambda folder: folder.config(num_hidden_layers=10**9), "expected 1 to 9,999"),
    "a context of 0": (lambda folder: folder.config(max_position_embeddings=0), "max_position_embeddings is 0"),
    "two types": (legacy_rope(type="linear", rope_type="yarn", factor=2.0), "rope_type 'yarn' and type 'linear'"),
    "a factor below 1": (legacy_rope(type="linear", factor=0.5), r"factor is 0\.5.*at least 1"),
    "LongRoPE with few factors": (
        legacy_rope(2 * ORIGINAL, type="longrope", original_max_position_embeddings=ORIGINAL, **FEW), "expected 4, half"
    ),
    "LongRoPE with a factor of 0": (
        legacy_rope(2 * ORIGINAL, type="longrope", original_max_position_embeddings=ORIGINAL, **NULL),
        r"long_factor\[3\] is 0.*a positive number",
    ),
    "more rotated than there is": (legacy_rope(rope_type="linear", factor=2.0, partial_rotary_factor=3), "rotates 24"),
    "integers without scales": (
        lambda folder: folder.tensors(as_integers), r"weight lm_head\.weight is stored as int8.*no quantization_config"
    ),
    "vocabulary as a string": (lambda folder: folder.config(vocab_size="264"), r"config\.json cannot be read"),
    "tokenizer no JSON": (lambda folder: (folder.path / "tokenizer.json").write_text("{"), "its tokenizer cannot be"),
}  # fmt: skip

# The model's shape, what is done to its folder, and a note that the plan prints.
TRAINED = {
    "plain": ({}, lambda folder: None, ""),
    "sharded": ({}, sharded, ""),
    "tied": ({"tie_word_embeddings": True}, lambda folder: None, ""),
    "tied, the output layer written too": (
        {"tie_word_embeddings": True}, lambda folder: folder.tensors(same_output_layer), ""
    ),
    "tied, with another output layer": (
        {"tie_word_embeddings": True}, lambda folder: folder.tensors(other_output_layer),
        "it is trained and exported as untied",
    ),
    "more embeddings than tokens": ({"vocab_size": 320}, lambda folder: None, ""),
    "Llama 3": ({}, legacy_rope(2 * ORIGINAL, rope_type="llama3", **LLAMA3), ""),
    "YaRN, max_position_embeddings the original length": ({}, legacy_rope(**YARN), ""),
    "YaRN, max_position_embeddings the longest": ({}, legacy_rope(2 * ORIGINAL, **YARN), ""),
    "linear, max_position_embeddings the original length": (
        {}, legacy_rope(type="linear", factor=2.0), "linear factor of 2: taken for the original length"
    ),
    "linear, original length stated": (
        {}, legacy_rope(2 * ORIGINAL, type="linear", factor=2.0, original_max_position_embeddings=ORIGINAL), ""
    ),
    "dynamic": ({}, legacy_rope(type="dynamic", factor=2.0), ""),
    "dynamic, in the current form": ({}, current_rope(rope_type="dynamic", factor=2.0), ""),
    "YaRN, in the current form": ({}, current_rope(rope_type="yarn", factor=2.0), ""),
    "LongRoPE, in the current form": (
        {}, current_rope(2 * ORIGINAL, rope_type="longrope", original_max_position_embeddings=ORIGINAL, **FACTORS), ""
    ),
    "LongRoPE by its first name": (
        {}, legacy_rope(2 * ORIGINAL, type="su", original_max_position_embeddings=ORIGINAL, **FACTORS), ""
    ),
    "Phi-3": (
        {"family": "phi3", "original_max_position_embeddings": ORIGINAL},
        legacy_rope(2 * ORIGINAL, type="su", **FACTORS), ""
    ),
    "theta as a string": ({}, legacy_rope(theta="10000.0"), ""),
    "a factor as a string": ({}, legacy_rope(type="dynamic", factor="2.0"), ""),
    "both forms, which agree": ({}, lambda folder: folder.rope(without=(), rope_theta=10_000.0), ""),
}  # fmt: skip


SWEEP = dict(
    methods=("lora",), references=(), steps=1, batch=2, warmup_steps=0, eval_documents=1, group_size=16,
    eval_span=CONTEXT, learning_rate_lora=1e-2,
)  # fmt: skip


def plan(folder, tmp_path, **fields):
    spec = SweepSpec(model=str(folder), data="builtin:stdlib", context_lengths=(CONTEXT,), **fields)
    return identify(check_sweep("strange", spec, RunOptions(storage=str(tmp_path / "runs"))))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare_texts(tmp_path_factory.mktemp, documents=10, lines=25)


def train_and_export(planned, corpus, tmp_path):
    """Trains one step of the sweep's first LoRA trial; returns the logits of the model in memory and of its export."""
    spec = planned.spec
    (trial,) = [each for each in expand(spec, planned.identities, "float32").trials if each.training.method == "lora"]
    folder = Storage(tmp_path / "runs").add_trial(trial, planned.source.location)
    engine, execution = Engine(torch.device("cpu"), "float32"), ExecutionConfig()
    model = build_model(planned.source, trial.training, engine, execution)
    Trial(model, trial.training, execution, corpus, folder.checkpoints, engine, emit_to(folder.journal)).run()
    export_trial(folder.path, tmp_path / "out", dtype="float32")
    tokens = torch.arange(CONTEXT)[None] % 256
    with torch.inference_mode(), full_attention(model):
        expected = model.eval()(input_ids=tokens).logits
        return expected, AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=tokens).logits


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(kind, tmp_path):
    change, message = REFUSED[kind]
    folder = Folder(tmp_path / "model")
    change(folder)
    found = error_of(plan, folder.path, tmp_path)
    assert re.search(message, found) and "\n" not in found


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        ("mistral", {"sliding_window": 16}, "do not all attend fully"),
        ("gemma3_text", {}, "different rotary positions in different layers"),
    ],
)
def test_models_whose_layers_differ_are_refused(family, shape, message, tmp_path):
    folder = Folder(tmp_path / "model", family, **shape)
    assert message in error_of(plan, folder.path, tmp_path)


@pytest.mark.parametrize("kind", TRAINED)
def test_what_can_be_trained_is_planned_trained_exported_and_reloaded(kind, corpus, tmp_path):
    shape, change, note = TRAINED[kind]
    folder = Folder(tmp_path / "model", **shape)
    change(folder)
    planned = plan(folder.path, tmp_path, **SWEEP)
    assert planned.original_length == ORIGINAL
    assert [note] if note else [] == [text for text in planned.model_notes if note in text]
    trained, exported = train_and_export(planned, corpus, tmp_path)
    torch.testing.assert_close(exported, trained, atol=1e-5, rtol=1e-5)


def test_a_gguf_file_is_planned_trained_exported_and_reloaded(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = small_llama(
        vocab_size=len(TOKENS), intermediate_size=64, num_key_value_heads=2, max_position_embeddings=ORIGINAL,
        tie_word_embeddings=True,
    )  # fmt: skip
    planned = plan(write_gguf(tmp_path / "model.gguf", model), tmp_path, **SWEEP)
    trained, exported = train_and_export(planned, corpus, tmp_path)
    torch.testing.assert_close(exported, trained, atol=1e-5, rtol=1e-5)


def test_own_positions_that_a_sweep_replaces_are_named(tmp_path):
    folder = Folder(tmp_path / "model")
    legacy_rope(type="yarn", factor=2.0, original_max_position_embeddings=16)(folder)
    (note,) = plan(folder.path, tmp_path, **SWEEP).model_notes
    assert "(yarn, from 16 to 32 tokens) are replaced by linear interpolation from 16 tokens at 64" in note


def test_an_original_length_that_the_configuration_leaves_open_can_be_given(tmp_path):
    folder = Folder(tmp_path / "model")
    legacy_rope(4 * ORIGINAL, type="linear", factor=4.0)(folder)
    assumed, given = (plan(folder.path, tmp_path, **SWEEP, **more) for more in ({}, {"original_length": ORIGINAL}))
    assert (assumed.original_length, given.original_length) == (4 * ORIGINAL, ORIGINAL)
    assert "its original length is 32: then give --original-length" in assumed.model_notes[0]
    assert not given.model_notes

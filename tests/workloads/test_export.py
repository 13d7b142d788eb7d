"""Exported models: what stock transformers and stock PEFT load is what was trained."""

import json
import shutil
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.models import small_llama
from tests.support.trained_trials import CONTEXT, ORIGINAL, TINY, TOKENS, llama, logits
from workloads import export
from workloads.adaptation.lora_fusion import fuse_lora
from workloads.adaptation.methods import adapt
from workloads.ask import load_model
from workloads.attention.interface import full_attention, use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.errors import InputError
from workloads.export import ExportMismatch, export_trial
from workloads.models import quantization
from workloads.stock_model import make_stock, merge, save_merged


def load_adapter(folder, base):
    """As a model card says."""
    model = AutoModelForCausalLM.from_pretrained(base.location, config=AutoConfig.from_pretrained(folder), dtype="auto")
    return PeftModel.from_pretrained(model, folder)


def is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


CASES = [
    ("lora", False, "linear"),
    ("lora", True, "yarn"),
    ("lora+", False, "yarn"),
    ("lora+", True, "linear"),
    ("lora", False, "ntk"),
    ("lora+", True, "dynamic"),
    ("lora+", False, "llama3"),
    ("full", False, "linear"),
    ("full", True, "yarn"),
]


@pytest.mark.parametrize(("method", "tied", "positions"), CASES)
def test_a_merged_model_gives_the_trained_ones_logits_in_stock_transformers(method, tied, positions, train, tmp_path):
    trained = train(method, tied, positions)
    report = export_trial(trained.folder, tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), trained.logits(), atol=1e-5, rtol=1e-5)
    assert (report.step, report.what) == (3, "merged") and report.difference < 1e-5
    assert is_tied(model) == tied
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("method", "tied", "positions"), [case for case in CASES if case[0] != "full"])
def test_an_adapter_gives_the_trained_ones_logits_in_stock_peft(method, tied, positions, train, tmp_path):
    trained = train(method, tied, positions)
    export_trial(trained.folder, tmp_path / "out", what="adapter", dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses
        model = load_adapter(tmp_path / "out", trained.base)
    torch.testing.assert_close(logits(model), trained.logits(), atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained.logits(), atol=1e-5, rtol=1e-5)
    assert is_tied(merged) == tied


def test_embeddings_and_norms_are_in_the_adapter_by_their_exact_names(train, tmp_path):
    trained = train("lora+", True, "linear")
    export_trial(trained.folder, tmp_path / "out", what="adapter", dtype="float32")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    live = dict(trained.model.named_parameters(remove_duplicate=False))
    whole = {name for name in saved if "lora_" not in name}
    assert len(whole) == 2 * 2 + 1 + 2  # the norms, the embeddings, and the output layer that is tied to them
    assert all(torch.equal(saved[name], live[name]) for name in whole)


def test_both_load_where_longspan_is_not_installed(train, tmp_path):
    trained = train("lora+", True, "yarn")
    for what in ("merged", "adapter"):
        export_trial(trained.folder, tmp_path / what, what=what, dtype="float32")
    save_file({"tokens": TOKENS, "logits": trained.logits().contiguous()}, tmp_path / "expected.safetensors")
    script = f"""
        import sys, torch
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForCausalLM
        expected = load_file("expected.safetensors")
        config = AutoConfig.from_pretrained("adapter")
        base = AutoModelForCausalLM.from_pretrained({trained.base.location!r}, config=config)
        for model in (AutoModelForCausalLM.from_pretrained("merged"), PeftModel.from_pretrained(base, "adapter")):
            with torch.inference_mode():
                found = model.eval()(input_ids=expected["tokens"]).logits
            torch.testing.assert_close(found, expected["logits"], atol=1e-5, rtol=1e-5)
        assert "workloads" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("positions", ["linear", "yarn"])
def test_the_exported_configuration_is_stock_and_reaches_the_trained_context(positions, train, tmp_path):
    trained = train("lora+", positions == "linear", positions)
    export_trial(trained.folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == positions and config["rope_parameters"]["factor"] == 2
    # Of linear positions vLLM and transformers' documentation take the original length times the factor.
    assert config["max_position_embeddings"] == (ORIGINAL if positions == "linear" else CONTEXT)
    assert config["dtype"] == "bfloat16" and config["use_cache"] is True
    assert not [key for key in config if "attn" in key or "longspan_attention" in key or "quantization" in key]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config._attn_implementation == "sdpa" and model.generation_config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a long context").input_ids == TINY.tokenizer()("a long context").input_ids
    assert tokenizer.model_max_length == CONTEXT
    suffixes = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert suffixes == {".safetensors", ".json", ".md"}


def test_dynamic_ntk_keeps_the_original_length_where_transformers_reads_it(tmp_path):
    """With rope_type dynamic max_position_embeddings is the original length, from which the frequencies follow."""
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    use_pattern(model, AttentionPattern(name="s2", group_size=16))
    with full_attention(model):
        expected = logits(model)
    save_merged(model, TINY.tokenizer(), tmp_path, "float32")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.max_position_embeddings == ORIGINAL
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(llama()), expected, atol=1e-3)  # the frequencies do change beyond it
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 4 * ORIGINAL


def test_bfloat16_is_the_float32_export_rounded_once(train, tmp_path):
    trained = train("lora+", False, "yarn")
    export_trial(trained.folder, tmp_path / "exact", dtype="float32")
    report = export_trial(trained.folder, tmp_path / "rounded")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert 0 < report.difference < 0.1 and "bfloat16" in str(report)


def test_a_trial_in_bfloat16_exports_its_frozen_weights_as_they_were_in_training(train, tmp_path):
    trained = train("lora+", False, "linear", "bfloat16")
    export_trial(trained.folder, tmp_path / "out", dtype="float32")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    live = dict(trained.model.named_parameters())
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(saved[name], live[f"base_model.model.{name}"].float())
    assert export_trial(trained.folder, tmp_path / "adapter", what="adapter", dtype="float32").difference < 1e-5


def test_an_untuned_trial_exports_its_positions(train, tmp_path):
    trained = train("untuned", False, "yarn")
    export_trial(trained.folder, tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), trained.logits(), atol=1e-5, rtol=1e-5)


def test_generation_settings_that_transformers_would_not_save_are_mended(tmp_path):
    """Llama 2 was published with a temperature although it decodes greedily, and with its original context length."""
    model = llama()
    model.generation_config.update(temperature=0.6, top_p=0.9, do_sample=False, max_length=ORIGINAL, use_cache=False)
    save_merged(model, TINY.tokenizer(), tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["do_sample"] is True and settings["temperature"] == 0.6
    assert settings.get("max_length") is None and settings["use_cache"] is True


def test_what_was_exported_can_be_asked(train, tmp_path):
    trained = train("lora+", True, "linear")
    for what in ("merged", "adapter"):
        export_trial(trained.folder, tmp_path / what, what=what, dtype="float32")
        model, _ = load_model(str(tmp_path / what), "cpu")
        torch.testing.assert_close(logits(model), trained.logits(), atol=1e-5, rtol=1e-5)


def test_a_trial_can_be_asked_as_it_is(train, trial):
    model, _ = load_model(str(trial), "cpu")
    torch.testing.assert_close(logits(model), train("lora+", False, "linear").logits(), atol=1e-5, rtol=1e-5)
    rounded, _ = load_model(str(train("lora+", False, "linear", "bfloat16").folder), "cpu")
    assert logits(rounded).dtype == torch.bfloat16  # which trains in two dtypes, and is asked in one
    said = []
    shutil.rmtree(trial / "checkpoints" / "step-00000003")
    load_model(str(trial), "cpu", said.append)
    assert said == ["this trial is not finished: step 2 of 3"]


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_a_trial_over_a_base_in_4_bits_exports_what_it_trained(what, train, tmp_path):
    """The adapter on a base in 4 bits; the merged model over what these stand for."""
    pytest.importorskip("bitsandbytes")
    trained = train("lora+", precision="bfloat16", bits="nf4")
    report = export_trial(trained.folder, tmp_path / "out", what=what, dtype="float32")
    card = (tmp_path / "out" / "README.md").read_text()
    assert report.difference < 1e-5 and "is that base dequantised" in str(report) and str(report)[1:] in card
    assert ("NF4" in card) == (what == "adapter")
    stretched, device = AutoConfig.from_pretrained(tmp_path / "out"), trained.model.device
    in_4_bits = quantization.nf4_loading(device, torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        trained.base.location, config=stretched, dtype=torch.bfloat16, **in_4_bits
    )
    if what == "merged":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(device)
    else:
        model = PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.autocast(device.type, torch.bfloat16):
        expected, found = trained.logits().float(), model.eval()(input_ids=TOKENS.to(device)).logits.float().cpu()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.gpu  # wherever bitsandbytes is installed
def test_a_quantised_base_is_dequantised_and_merged_without_being_quantised_again(tmp_path):
    """QLoRA: the oracle merges by hand what bitsandbytes says the codes stand for."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4, dtype=torch.float32)
    model = adapt(model, "lora+")
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(projection.lora_B["default"].weight)
    codes = projection.base_layer.weight
    expected = dequantize_4bit(codes.data, codes.quant_state).float().cpu()
    expected += 2 * (projection.lora_B["default"].weight @ projection.lora_A["default"].weight).detach().cpu()  # 16 / 8
    make_stock(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trains if "base_layer" in name]
    save_merged(merge(model.to("cpu")), TINY.tokenizer(), tmp_path / "out", "float32")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()


def another_base(kind, trained, folder):
    """What was exported, in ``folder / "adapter"``, when it is not what it was or its base is another."""
    export_trial(trained.folder, folder / "adapter", what="adapter", dtype="float32")
    base = folder / "base"
    shutil.copytree(trained.base.location, base)
    if kind == "other weights":
        llama(initializer_range=0.2).save_pretrained(base)
    elif kind == "another shape":
        llama(intermediate_size=64).save_pretrained(base)
        (folder / "adapter" / "base.json").unlink()  # as if it came from elsewhere
    elif kind == "half of its base":
        tensors = load_file(base / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
        save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
        (folder / "adapter" / "base.json").unlink()
    elif kind in ("norm", "lora"):  # without those of one layer
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not ("layers.1" in name and kind in name)}
        save_file(kept, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder / "adapter")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other weights", "was trained from another base than .*: from sha256:.*, and this is sha256:.*Write into"),
        ("another shape", "6 of its weights are not in its safetensors or have another shape.*write there where it is"),
        ("half of its base", "9 of its weights are not in its safetensors or have another shape.*write there where"),
        ("norm", r"layers\.1\.input_layernorm.*damaged, or another base's"),
        ("lora", "missing adapter keys.*damaged, or another base's"),
    ],
)
def test_an_adapter_on_another_base_or_a_damaged_one_is_refused(kind, message, train, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        load_model(another_base(kind, train("lora+", False, "yarn"), tmp_path), "cpu")
    assert "\n" not in str(refused.value)


def test_an_adapter_on_its_base_elsewhere_is_what_it_was(train, tmp_path):
    trained = train("lora+", False, "yarn")
    model, _ = load_model(another_base("the same", trained, tmp_path), "cpu")
    torch.testing.assert_close(logits(model), trained.logits(), atol=1e-5, rtol=1e-5)


def test_an_export_that_is_not_the_trained_model_fails_and_leaves_nothing(train, tmp_path, monkeypatch):
    def save_damaged(model, tokenizer, out, dtype):
        save_merged(model, tokenizer, out, dtype)
        tensors = load_file(out / "model.safetensors")
        tensors["model.norm.weight"] += 0.01
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "save_merged", save_damaged)
    with pytest.raises(ExportMismatch, match="logits differ by"):
        export_trial(train("full", False, "linear").folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["full", "untuned"])
def test_what_has_no_adapter_says_so(method, train, tmp_path):
    trained = train(method, False, "linear" if method == "full" else "yarn")
    with pytest.raises(InputError, match=f"{method}.*no adapter.*--what merged"):
        export_trial(trained.folder, tmp_path / "out", what="adapter")


def test_the_command_says_how_near_the_export_is_and_ends_a_mistake_in_one_line(train, tmp_path, capsys):
    trial = str(train("lora", False, "linear").folder)
    assert export.main([trial, str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "step 3, saved in float32" in capsys.readouterr().out
    assert export.main([trial, str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and "not empty" in told


def test_where_lora_adapts_some_of_what_computes_together_the_merged_model_is_plain():
    model, tokens = adapt(small_llama(), "lora", lora_targets=("q_proj", "v_proj")), torch.arange(16)[None]
    fuse_lora(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    merged = merge(model)
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    attention = merged.model.layers[0].self_attn
    assert {type(each) for each in (attention.q_proj, attention.k_proj, attention.v_proj)} == {torch.nn.Linear}

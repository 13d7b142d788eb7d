"""A 4-bit base: what is refused, and on a GPU what trains."""

import importlib.util

import pytest
import torch

from tests.support.models import small_llama
from workloads.adaptation.methods import count_parameters, trainable_parameters
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.quantization import nf4_loading
from workloads.models.source import ModelSource
from workloads.training.optimization import build_optimizer, set_learning_rate
from workloads.training.setup import build_model


def config(method="lora+", quantization="nf4", **overrides):
    values = dict(context_length=64, eval_span=64, group_size=16, steps=20, warmup_steps=2, learning_rate=3e-3)
    return TrainingConfig(
        **{**values, "method": method, "quantization": quantization, "precision": "bfloat16", **overrides}
    )


def saved_llama(folder, tied):
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=128, max_position_embeddings=64)
    small_llama(**shape, tie_word_embeddings=tied, initializer_range=0.1).save_pretrained(folder)
    return ModelSource.parse(str(folder))


def test_a_trial_without_a_gpu_is_refused_where_its_model_is_built(tmp_path):
    source = saved_llama(tmp_path, tied=True)
    with pytest.raises(InputError, match="needs a CUDA GPU, but this trial runs on cpu"):
        build_model(source, config(), Engine(torch.device("cpu"), "bfloat16"), ExecutionConfig())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_error_says_how_to_install_it():
    with pytest.raises(InputError, match=r"pip install 'longspan\[gpu\]'"):
        nf4_loading(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(("method", "steps"), [("full", 20), ("untuned", 0)])
def test_only_lora_methods_can_have_a_quantised_base(method, steps):
    with pytest.raises(InputError, match=f"'nf4' with the method '{method}'.*choose a LoRA method"):
        config(method, steps=steps)


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False])
def test_nf4_trains_near_to_bfloat16_over_a_base_that_stays_as_it_is(tied, tmp_path):
    pytest.importorskip("bitsandbytes")
    source = saved_llama(tmp_path, tied)
    engine = Engine(torch.device("cuda", 0), "bfloat16")
    tokens = torch.randint(96, (4, 64), generator=torch.Generator().manual_seed(0)).to(engine.device)
    losses = {}
    for quantization in ("none", "nf4"):
        settings = config(quantization=quantization)
        model = build_model(source, settings, engine, ExecutionConfig(gradient_checkpointing="all"))
        assert count_parameters(model) == count_parameters(build_model(source, config(), engine, ExecutionConfig()))
        trainable = trainable_parameters(model)
        assert {p.dtype for p in trainable.values()} == {torch.float32}
        assert all(any(kind in name for name in trainable) for kind in ("lora_A", "norm", "embed_tokens"))
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        linear = {p.dtype for n, p in frozen.items() if "_proj" in n}
        assert linear == ({torch.uint8} if quantization == "nf4" else {torch.bfloat16})
        optimizer = build_optimizer(model, settings)
        losses[quantization] = []
        for step in range(settings.steps):
            set_learning_rate(optimizer, settings, step)
            with engine.autocast():
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[quantization].append(loss.item())
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert losses["nf4"][-1] < losses["nf4"][0] - 0.3
    assert losses["nf4"] == pytest.approx(losses["none"], rel=0.05)

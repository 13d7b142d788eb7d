"""What trains under each method, in which layers, by count and by name."""

import re
import warnings

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

from tests.support.models import small_llama, small_model
from workloads.adaptation.lora_fusion import fuse_lora
from workloads.adaptation.methods import (
    adapt,
    check_adaptation,
    count_parameters,
    decoder_layers,
    keep_autocast_dtype,
    trainable_parameters,
)
from workloads.config import TrainingConfig, trained_layers
from workloads.errors import InputError
from workloads.models.families import FAMILIES
from workloads.training.optimization import build_optimizer, set_learning_rate

LORA_METHODS = ("lora", "lora+norm", "lora+embed", "lora+")


def kinds(model):
    """What trains, as (kind, layer) pairs; layer None is outside the layers."""
    found = set()
    for name in trainable_parameters(model):
        layer = re.search(r"\.(?:layers|blocks)\.(\d+)\.", "." + name)
        kind = next((kind for kind in ("lora_", "norm", "embed_tokens", "lm_head") if kind in name), "weight")
        found.add((kind, int(layer[1]) if layer else None))
    return found


def config(method, **overrides):
    return TrainingConfig(
        **{"context_length": 16, "eval_span": 16, "attention": "full", "method": method, "steps": 1000, **overrides}
    )


def train_once(model, method):
    """One AdamW update on some tokens, as the training loop makes it."""
    optimizer = build_optimizer(model, config(method, learning_rate=1e-2))
    model(torch.arange(16)[None]).logits.float().square().mean().backward()
    optimizer.step()


def test_lora_plus_on_llama2_7b_trains_what_the_papers_code_trains():
    """Embedding 131,076,096 + norms 266,240 + LoRA (rank 8 on q, k, v, o) 8,388,608; the authors added a token."""
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=32001, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
        )
        adapted = adapt(model, "lora+", lora_rank=8)
    by_kind = {"lora": 0, "norm": 0, "embed": 0}
    for name, parameter in trainable_parameters(adapted).items():
        by_kind[next(kind for kind in by_kind if kind in name)] += parameter.numel()
    assert by_kind == {"embed": 131_076_096, "norm": 266_240, "lora": 8_388_608}


LORA = {("lora_", 0), ("lora_", 1)}
NORMS = {("norm", 0), ("norm", 1), ("norm", None)}
EMBEDDINGS = {("embed_tokens", None)}


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        ("untuned", set()),
        ("lora", LORA),
        ("lora+norm", LORA | NORMS),
        ("lora+embed", LORA | EMBEDDINGS),
        ("lora+", LORA | NORMS | EMBEDDINGS),
        ("full", {("weight", 0), ("weight", 1), ("lm_head", None)} | NORMS | EMBEDDINGS),
    ],
)
def test_each_method_trains_its_set_and_nothing_else(method, trains):
    model = adapt(small_llama(), method)
    assert kinds(model) == trains
    if method == "full":
        assert len(set(count_parameters(model))) == 1


@pytest.mark.parametrize("method", ["lora+embed", "lora+"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_train_tied_ones_stay_one_tensor_and_else_the_output_layer_stays(method, tied):
    model = adapt(small_llama(tie_word_embeddings=tied), method)
    before = model.get_input_embeddings().weight.detach().clone()
    output_before = model.get_output_embeddings().weight.detach().clone()
    train_once(model, method)
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings is output) == tied
    assert not torch.equal(embeddings, before)
    assert torch.equal(output, embeddings if tied else output_before)


def test_gpt_neox_trains_its_input_embeddings_and_not_its_embed_out():
    """The authors' substring match on "embed" catches ``embed_out``, which is the output layer."""
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    names = trainable_parameters(adapt(GPTNeoXForCausalLM(GPTNeoXConfig(**shape)), "lora+"))
    assert [name for name in names if "embed" in name] == ["base_model.model.gpt_neox.embed_in.weight"]
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in names if "lora_" in name}
    assert adapted == {"query_key_value", "dense"}
    assert sum("norm" in name for name in names) == 2 * (2 * 2 + 1)  # weight and bias


@pytest.mark.parametrize("method", [*LORA_METHODS, "full"])
def test_an_untrained_adaptation_changes_no_output(method):
    tokens = torch.arange(16)[None]
    before = small_llama()(tokens).logits
    torch.testing.assert_close(adapt(small_llama(), method, train_layers="last 1")(tokens).logits, before)


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last 2", [4, 5]),
        ("last 6", [0, 1, 2, 3, 4, 5]),
        ("every 2", [0, 2, 4]),
        ("every 4", [0, 4]),
        ("3", [3]),
        ("0,2,5", [0, 2, 5]),
    ],
)
def test_a_choice_of_layers(choice, layers):
    assert list(trained_layers(choice, 6)) == layers


@pytest.mark.parametrize("choice", ["last 7", "every 7", "0,6", "6"])
def test_a_choice_beyond_the_model_names_its_number_of_layers(choice):
    with pytest.raises(InputError, match=r"the model has 6 layers \(0 to 5\)"):
        trained_layers(choice, 6)


@pytest.mark.parametrize("choice", ["", "some", "last", "last 0", "every -1", "0,,1", "2,1", "1,1", "-1", "last four"])
def test_a_choice_of_no_known_form_is_refused_where_a_trial_is_made(choice):
    with pytest.raises(InputError, match="expected all, a number of last layers"):
        config("lora", train_layers=choice)


def test_the_layer_choice_restricts_lora_and_the_norms_of_layers_while_the_rest_follows_the_method():
    """Embeddings and the final norm are in no layer."""
    model = adapt(small_llama(num_hidden_layers=4), "lora+", train_layers="1,3")
    assert kinds(model) == {("lora_", 1), ("lora_", 3), ("norm", 1), ("norm", 3), ("norm", None), *EMBEDDINGS}


@pytest.mark.parametrize("tied", [True, False])
def test_full_with_a_layer_choice_trains_these_layers_and_nothing_outside(tied):
    model = adapt(small_llama(num_hidden_layers=4, tie_word_embeddings=tied), "full", train_layers="last 2")
    assert kinds(model) == {("weight", 2), ("weight", 3), ("norm", 2), ("norm", 3)}


def test_lora_adapts_the_modules_that_are_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's deprecated names are none of the user's business
        adapt(small_llama(), "lora")
    model = adapt(small_llama(), "lora", lora_targets=("down_proj", "q_proj"), lora_rank=4, lora_alpha=8)
    lora = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable_parameters(model)}
    assert lora == {"down_proj", "q_proj"}
    # rank x (in + out) a module, in each of two layers
    assert count_parameters(model)[1] == 2 * 4 * ((32 + 32) + (48 + 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lora_targets=("q_proj", "qproj")), r"has qproj,.*LlamaForCausalLM.*down_proj, gate_proj, k_proj, o_proj"),
        (dict(lora_targets=("lm_head",)), r"has lm_head,.*their linear modules: down_proj"),
        (dict(lora_rank=9), r"lora_rank is 9, but k_proj has a side of 8.*up to 8"),
        (dict(train_layers="last 3"), r"'last 3', but the model has 2 layers"),
    ],
)
def test_what_the_model_cannot_have_is_refused(changes, message):
    model = small_llama(num_key_value_heads=1)
    with pytest.raises(InputError, match=message):
        check_adaptation(model.config, "lora", **changes)
    with pytest.raises(InputError, match=message):
        adapt(model, "lora", **changes)


def test_a_rank_may_be_as_large_as_the_smaller_side_of_what_is_adapted():
    adapt(small_llama(num_key_value_heads=1), "lora", lora_rank=8)
    adapt(small_llama(num_key_value_heads=1), "lora", lora_rank=32, lora_targets=("q_proj",))


def test_models_that_longspan_does_not_know_its_way_in_are_refused_by_name():
    with pytest.raises(InputError, match=r"Sequential has no list of decoder layers"):
        adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), "lora")
    with pytest.raises(InputError, match=r"MptForCausalLM has none of the attention projections.*Wqkv"):
        adapt(MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=32)), "lora")


@pytest.mark.parametrize("method", [*LORA_METHODS, "full"])
def test_what_trains_and_its_optimiser_state_are_float32_and_the_frozen_rest_keeps_its_precision(method):
    model = adapt(small_llama().bfloat16(), method, train_layers="last 1")
    optimizer = build_optimizer(model, config(method))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(16)[None]).logits.float().square().mean().backward()
    optimizer.step()
    trainable = trainable_parameters(model)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_thousand_small_updates_add_up_which_bfloat16_would_lose():
    """Under a constant gradient AdamW moves by its learning rate each step: 1,000 x 2e-5 from 1.0 is 0.98.

    The spacing of bfloat16 below 1.0 is 0.0039, which rounds each step away.
    """
    model = adapt(small_llama().bfloat16(), "lora+norm")
    norm = model.get_base_model().model.norm.weight
    settings = config("lora+norm", learning_rate=2e-5, warmup_steps=0)
    optimizer = build_optimizer(model, settings)
    in_bfloat16 = torch.ones(32, dtype=torch.bfloat16, requires_grad=True)
    lossy = torch.optim.AdamW([in_bfloat16], lr=2e-5, weight_decay=0)
    assert torch.equal(norm, torch.ones(32))
    for step in range(1000):
        norm.grad, in_bfloat16.grad = torch.ones_like(norm), torch.ones_like(in_bfloat16)
        set_learning_rate(optimizer, settings, step)
        optimizer.step()
        lossy.step()
    # 1,000 roundings of float32 next to 1.0 (spacing 6e-8) may add up to 3e-5.
    torch.testing.assert_close(norm.detach(), torch.full((32,), 0.98), rtol=0, atol=3e-5)
    assert torch.equal(in_bfloat16, torch.ones(32, dtype=torch.bfloat16))


def what_runs_through(model, tokens):
    """Logits, gradients, and the dtypes that decoder layers and the linear modules of a layer are given."""
    given = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: given.add(inputs[0].dtype))
        for layer in decoder_layers(model)[1]
        for module in (layer, *layer.modules())
        if module is layer or isinstance(module, torch.nn.Linear)
    ]
    logits = model(tokens).logits
    model.zero_grad()
    logits.float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    return logits.detach(), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}, given


@pytest.mark.parametrize("method", ["lora", "lora+", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_all_that_runs_through_a_model_is_bfloat16(family, method):
    """Also where embeddings and norms are float32. Where they are not, nothing is rounded otherwise."""
    model, tokens = adapt(small_model(family).bfloat16(), method), torch.arange(16)[None]
    fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients, _ = what_runs_through(model, tokens)
        keep_autocast_dtype(model)
        logits, gradients, given = what_runs_through(model, tokens)
    assert given == {torch.bfloat16}
    assert (logits - expected).norm() <= (0 if method == "lora" else 0.02) * expected.norm()
    for name, gradient in expected_gradients.items():
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - gradient).norm() <= (0 if method == "lora" else 0.05) * gradient.norm(), name


def test_without_autocast_nothing_is_cast():
    model, tokens = adapt(small_llama(), "lora+"), torch.arange(16)[None]
    fuse_lora(model)
    expected, expected_gradients, _ = what_runs_through(model, tokens)
    keep_autocast_dtype(model)
    logits, gradients, given = what_runs_through(model, tokens)
    assert given == {torch.float32} and torch.equal(logits, expected)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected_gradients.items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj", "gate_proj", "down_proj")])
def test_lora_computes_what_pefts_own_layers_do(targets, family):
    """With biases (Qwen2), with joined projections (Phi-3), and beside layers that LoRA does not adapt.

    Its layers stay PEFT's: they can be merged and switched off.
    """
    if family == "phi3":
        targets = targets and ("qkv_proj", "down_proj")
    tokens, results = torch.arange(16)[None], []
    for peft_as_it_is in (True, False):
        model = adapt(small_model(family).double(), "lora", lora_alpha=12, lora_targets=targets)
        if not peft_as_it_is:
            fuse_lora(model)
        layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        for layer in layers:
            for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
                matrix.weight.data = torch.randn(matrix.weight.shape, generator=generator, dtype=torch.float64)
        logits, gradients, _ = what_runs_through(model, tokens)
        with model.disable_adapter():
            without = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
        results.append({"logits": logits, **gradients, "without": without, "merged": merged})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-12, atol=1e-12, msg=name)


def test_gradients_are_those_of_autocast_also_where_what_it_is_given_is_float32():
    """A bfloat16 base, float32 activations (no ``keep_autocast_dtype``), and the backward pass outside autocast."""
    tokens, results = torch.arange(16)[None], []
    for spared in (False, True):
        model = adapt(small_llama().bfloat16(), "lora+")
        if spared:
            fuse_lora(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens).logits.float().square().mean()
        loss.backward()
        results.append({name: parameter.grad for name, parameter in trainable_parameters(model).items()})
    for name, expected in results[0].items():
        assert (results[1][name] - expected).norm() <= 0.02 * expected.norm(), name


def test_layers_that_share_an_input_read_it_once_and_keep_nothing():
    """Of q, k and v together A is one product forwards; and an input that comes twice is computed twice."""
    model = adapt(small_llama(), "lora")
    fuse_lora(model)
    attention = decoder_layers(model)[1][0].self_attn
    x = torch.randn(2, 5, attention.q_proj.in_features)
    given = []
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.lora_A["default"].register_forward_hook(lambda *_: given.append("alone"))
        expected = projection.base_layer(x)
        torch.testing.assert_close(projection(x), expected)  # B is zero
        torch.testing.assert_close(projection(x.clone()), expected)
    assert not given
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection(x)
    assert attention.q_proj.fused_group.input is None and not attention.q_proj.fused_group.pending

"""The chunked loss is the plain one, values and gradients, in every family."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.models import plain_losses, small_llama, small_model
from workloads.adaptation.methods import adapt
from workloads.models.families import FAMILIES
from workloads.training import loss as loss_module
from workloads.training.loss import NextTokenLoss, next_token_losses

VOCABULARY = 64
# Of 2 x 25 tokens, so that the last chunk is a shorter one, and one chunk has tokens of both sequences.
CHUNK = 7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", CHUNK * VOCABULARY + 5)


def batch(batch_size=2, length=25):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, VOCABULARY, (batch_size, length), generator=generator)
    return tokens, torch.rand(batch_size, length, generator=generator) * (tokens % 3 > 0)  # a third is not scored


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def of_the_plain_path(model, tokens, weights, **inputs):
    model.zero_grad()
    loss = (plain_losses(model(input_ids=tokens, **inputs).logits, tokens) * weights[:, 1:]).sum()
    (3 * loss).backward()
    return loss.detach(), gradients(model)


def of_the_chunked_path(model, tokens, weights, recompute=False, **inputs):
    model.zero_grad()
    loss = NextTokenLoss(model, recompute)(tokens, weights, **inputs)
    (3 * loss).backward()
    return loss.detach(), gradients(model)


def softcapped(family):
    return {"final_logit_softcapping": 2.0} if family in ("gemma2", "gemma3_text") else {}


@pytest.mark.parametrize("recompute", [False, True], ids=["at once", "recomputed"])
@pytest.mark.parametrize(("method", "tied"), [("lora+", False), ("lora+", True), ("full", False), ("full", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_the_plain_ones(family, method, tied, recompute):
    """In float64; the head is frozen, or trains, or is the embedding that trains. What trains twice adds up."""
    model = adapt(small_model(family, tie_word_embeddings=tied, **softcapped(family)), method).double()
    tokens, weights = batch()
    inputs = {"attention_mask": torch.ones_like(tokens)}
    expected, expected_gradients = of_the_plain_path(model, tokens, weights.double(), **inputs)
    found, found_gradients = of_the_chunked_path(model, tokens, weights.double(), recompute, **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_scores_what_the_model_says(family):
    model = small_model(family, **softcapped(family))
    tokens, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(next_token_losses(model, tokens), plain_losses(model(tokens).logits, tokens))


@pytest.mark.parametrize("method", ["lora+", "full"])
def test_bfloat16_rounds_as_the_plain_path_does(method):
    """Under autocast: logits of a bfloat16 product, a softmax in float32.

    The loss is the same but for the order of the sum, and gradients agree within bfloat16's rounding.
    """
    model = adapt(small_llama(vocab_size=VOCABULARY, initializer_range=0.2).bfloat16(), method)
    tokens, weights = batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = of_the_plain_path(model, tokens, weights)
        found, found_gradients = of_the_chunked_path(model, tokens, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for name, gradient in expected_gradients.items():
        assert (found_gradients[name] - gradient).norm() <= 0.02 * gradient.norm(), name


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives, of those that it has not been given."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        sizes = [value.numel() for value in tree_leaves(made) if isinstance(value, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize("recompute", [False, True])
def test_no_tensor_has_the_logits_of_all_tokens(recompute):
    model = adapt(small_llama(vocab_size=1024), "lora")
    tokens, weights = batch(length=64)
    with LargestTensor() as largest:
        of_the_chunked_path(model, tokens, weights, recompute)
        next_token_losses(model, tokens)
    assert largest.elements < tokens.numel() * 1024 / 2

"""Learning rates: a group for each kind of parameter, and a schedule that a second implementation agrees with."""

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tests.support.models import small_llama
from workloads.adaptation.methods import adapt, trainable_parameters
from workloads.config import TrainingConfig
from workloads.errors import InputError
from workloads.training.optimization import build_optimizer, learning_rate, set_learning_rate


def config(**overrides):
    values = dict(context_length=16, eval_span=16, attention="full", method="lora+", steps=20, warmup_steps=4)
    return TrainingConfig(**{**values, **overrides})


def adapted(method, tied=False):
    return adapt(small_llama(tie_word_embeddings=tied), method)


def rates(model, settings, step):
    """Learning rate of each trainable parameter, by name, in the update after ``step`` steps."""
    optimizer = build_optimizer(model, settings)
    set_learning_rate(optimizer, settings, step)
    by_parameter = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: by_parameter.pop(p) for name, p in trainable_parameters(model).items()}
    assert not by_parameter
    return found


@pytest.mark.parametrize(("method", "tied"), [("lora+", False), ("lora+", True), ("full", False), ("full", True)])
def test_embeddings_and_norms_have_rates_of_their_own(method, tied):
    settings = config(
        method=method, learning_rate=8.0, learning_rate_embeddings=4.0, learning_rate_norms=2.0, schedule="linear"
    )
    model = adapted(method, tied)
    for step, share in ((0, 0.25), (3, 1.0), (4, 1.0), (12, 0.5)):
        for name, rate in rates(model, settings, step).items():
            assert rate == share * (4.0 if "embed_tokens" in name else 2.0 if "norm" in name else 8.0), name


@pytest.mark.parametrize("method", ["lora", "lora+norm", "lora+embed", "lora+", "full"])
def test_without_rates_of_their_own_all_parameters_have_the_methods_rate(method):
    assert set(rates(adapted(method), config(method=method, learning_rate=3e-3), 7).values()) == {3e-3}


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        ("constant", lambda optimizer: get_constant_schedule_with_warmup(optimizer, 4)),
        ("cosine", lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 4, 20)),
        ("linear", lambda optimizer: get_linear_schedule_with_warmup(optimizer, 4, 20)),
    ],
)
def test_schedules_are_those_of_transformers_but_for_a_first_update_of_rate_zero(schedule, reference):
    """Transformers warms up from zero, which wastes the first update; ours begins with its second rate."""
    scheduler = reference(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4))
    theirs = []
    for _ in range(21):
        theirs.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    ours = [learning_rate(config(schedule=schedule, learning_rate=3e-4), step) for step in range(20)]
    assert ours[:4] == pytest.approx(theirs[1:5])
    assert ours[4:] == pytest.approx(theirs[4:20])
    assert ours[3] == ours[4] == 3e-4
    assert schedule == "constant" or 0 < ours[-1] < 0.1 * 3e-4


def test_warm_up_takes_equal_steps_up_to_the_peak():
    assert [learning_rate(config(learning_rate=8.0), step) for step in range(6)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_groups_update_as_one_adamw_over_everything_does():
    one, other = adapted("full"), adapted("full")
    settings = config(method="full", learning_rate=1e-2, weight_decay=0.1, warmup_steps=0)
    grouped = build_optimizer(one, settings)
    plain = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        for model, optimizer in ((one, grouped), (other, plain)):
            set_learning_rate(grouped, settings, step)
            model(torch.arange(8)[None]).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(learning_rate_norms=0.0), "learning_rate_norms is 0.0; expected a positive number"),
        (dict(learning_rate_embeddings=float("inf")), "learning_rate_embeddings is inf"),
        (dict(weight_decay=float("nan")), "weight_decay is nan; expected a finite number"),
        (dict(max_grad_norm=float("inf")), "max_grad_norm is inf; expected a finite number"),
        (dict(method="lora", learning_rate_norms=1e-3), "no norms train with the method 'lora'"),
        (dict(method="lora+norm", learning_rate_embeddings=1e-3), "no embeddings train"),
        (dict(method="full", train_layers="last 1", learning_rate_embeddings=1e-3), "no embeddings train.*'last 1'"),
    ],
)
def test_a_rate_that_cannot_be_or_would_have_no_effect_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        config(**overrides)

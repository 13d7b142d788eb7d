"""A trial's identity: what changes its fingerprint, and what must not."""

import dataclasses
import json

import pytest

from orchestrator.trial_spec import Identities, TrialSpec
from workloads.config import TrainingConfig

IDENTITIES = Identities(model="sha256:m", tokenizer="sha256:t", data="stdlib:d")


def trial(**training):
    values = dict(context_length=2048, method="lora", group_size=512, steps=40, eval_span=2048)
    return TrialSpec(
        model="builtin:tiny",
        data="builtin:stdlib",
        identities=IDENTITIES,
        training=TrainingConfig(**{**values, **training}),
    )


# Users have trials with this fingerprint in storage: a change makes them train again. Raise RESULT_VERSION if
# results are meant to change; otherwise keep it.
def test_the_fingerprint_is_stable():
    assert trial().fingerprint == "7d8c84161b401c29"


def test_a_field_at_its_default_is_the_same_trial_whether_it_is_named_or_not():
    default = next(f.default for f in dataclasses.fields(TrainingConfig) if f.name == "lora_rank")
    assert trial(lora_rank=default).fingerprint == trial().fingerprint
    assert trial(lora_rank=16).fingerprint != trial().fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"context_length": 1024}, {"method": "full"}, {"group_size": 1024}, {"positions": "yarn"}, {"steps": 41},
        {"batch": 8}, {"learning_rate": 1e-3}, {"seed": 1}, {"precision": "bfloat16"}, {"eval_documents": 3},
        {"attention": "full", "group_size": None}, {"beta2": 0.999}, {"train_layers": "last 1"}, {"schedule": "cosine"},
        {"method": "lora+norm"}, {"lora_targets": ("q_proj",)}, {"quantization": "nf4"}, {"positions": "ntk"},
        {"attention": "short"}, {"document_mask": True},
    ],
)  # fmt: skip
def test_whatever_changes_the_result_changes_the_fingerprint(change):
    assert trial(**change).fingerprint != trial().fingerprint


@pytest.mark.parametrize("field", ["model", "tokenizer", "data"])
def test_other_content_is_another_trial(field):
    changed = dataclasses.replace(trial(), identities=dataclasses.replace(IDENTITIES, **{field: "other"}))
    assert changed.fingerprint != trial().fingerprint


def test_where_things_lie_is_not_part_of_the_trial():
    moved = dataclasses.replace(trial(), model="/elsewhere/tiny", data="/elsewhere/text")
    assert moved.fingerprint == trial().fingerprint


@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj")])
def test_a_trial_survives_json(targets):
    there_and_back = TrialSpec.from_dict(json.loads(json.dumps(trial(lora_targets=targets).to_dict())))
    assert there_and_back == trial(lora_targets=targets)


def test_the_order_of_lora_targets_makes_no_other_trial():
    one, other = (trial(lora_targets=targets) for targets in (("v_proj", "q_proj"), ("q_proj", "v_proj")))
    assert one.fingerprint == other.fingerprint

"""The job that a driver and its workers receive."""

import dataclasses
import json

import pytest

from orchestrator.planning.early_stopping import EarlyStopping
from orchestrator.running.job import FaultLimits, Resources, TrialJob
from orchestrator.trial_spec import Identities, TrialSpec
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.models.source import ModelSource

TRIAL = TrialSpec(
    model="builtin:tiny",
    data="builtin:stdlib",
    identities=Identities(model="m", tokenizer="t", data="d"),
    training=TrainingConfig(
        method="lora", attention="full", context_length=1024, eval_span=1024, lora_targets=("q_proj",)
    ),
)
JOB = TrialJob(
    id="1", sweep="s", storage="runs", trials=(TRIAL,), model=ModelSource("org/name", "org/name", "5d6e7f"), corpus="c",
    execution=ExecutionConfig(micro_batch=2), layers=2, resources=Resources(workers=1, cpus=1, gpus=0),
    limits=FaultLimits(max_failures=1, max_preemptions=1, hang_timeout=60), own_cluster=True,
    early_stopping=EarlyStopping(rule="asha"), provenance={"git_commit": None}, prices={"NVIDIA H200": 2.5},
)  # fmt: skip


@pytest.mark.parametrize("early_stopping", [JOB.early_stopping, None])
def test_a_job_survives_its_way_through_files(early_stopping):
    job = dataclasses.replace(JOB, early_stopping=early_stopping)
    assert TrialJob.from_config(json.loads(json.dumps(job.to_config()))) == job

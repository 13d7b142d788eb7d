"""What Ray Train is asked for, for a trial."""

import pytest

from orchestrator.running.driver import _trainer


@pytest.mark.parametrize("own_cluster", [True, False])
def test_no_actor_is_started_that_has_nothing_to_do(own_cluster, tmp_path):
    config = {
        "resources": {"workers": 1, "cpus": 1, "gpus": 0}, "own_cluster": own_cluster,
        "hang_timeout": 60, "max_failures": 1, "max_preemptions": 1,
    }  # fmt: skip
    callbacks = {type(each).__name__ for each in _trainer(config, tmp_path, "trial")._create_default_callbacks()}
    assert "BackendSetupCallback" in callbacks
    assert "DatasetsCallback" not in callbacks
    assert ("PlacementGroupCleanerCallback" in callbacks) == (not own_cluster)

"""Trained trials, for what is done with them afterwards."""

import functools
import shutil

import pytest

from tests.support.texts import prepare_texts
from tests.support.trained_trials import train_trial


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """Trains a trial of a small random model for three steps, once for each set of arguments."""
    root, corpus = tmp_path_factory.mktemp("runs"), prepare_texts(tmp_path_factory.mktemp, documents=20, lines=25)
    once = functools.cache(functools.partial(train_trial, root, corpus))

    def train(method="lora+", tied=False, positions="linear", precision="float32", bits="none"):
        return once(method, tied, positions, precision, bits)

    return train


@pytest.fixture
def trial(train, tmp_path):
    """A copy of a trial that a test may spoil."""
    return shutil.copytree(train("lora+", False, "linear").folder, tmp_path / "trials" / "spoilt")

"""Two workers compared with one, on a CPU with a tiny shape."""

import statistics

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import processes
from benchmarks.scaling import STEPS, Point, configuration, point, table
from tests.support.workers import FORK_SERVER

CONFIG = LlamaConfig(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmark itself runs")
@pytest.mark.workers
def test_two_workers_train_together_and_are_told_beside_one(monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", FORK_SERVER.get_start_method())
    one = Point(workers=1, engine="ddp", seconds=[0.1], tokens_per_second=640.0)
    two = point(CONFIG, configuration(64, 16, 2, False), "ddp", False)
    assert two.failure is None
    assert len(two.seconds) == STEPS
    assert two.tokens_per_second == pytest.approx(2 * 64 / statistics.median(two.seconds))
    head, _, first, second = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table([one, two]).splitlines())
    assert (first[:2], second[:2]) == (["1", "ddp"], ["2", "ddp"])
    assert second[head.index("x one")] == f"{two.tokens_per_second / 640:.2f}"


def test_a_number_that_failed_says_why_in_its_row():
    one = Point(workers=1, engine="ddp", seconds=[0.1], tokens_per_second=640.0)
    failed = Point(workers=2, engine="zero2", failure="ValueError: 32,768 tokens do not fit")
    assert table([one, failed]).splitlines()[-1] == "| 2 | zero2 | ValueError: 32,768 tokens do not fit | | | | |"

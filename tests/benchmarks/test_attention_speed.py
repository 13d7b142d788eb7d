"""The table of attention alone, on a CPU with tiny shapes."""

import json

import pytest
import torch

from benchmarks.attention_speed import CASES, PUBLISHED, Case, as_json, head, implementations, line, measure
from benchmarks.timing import write_json

CPU = torch.device("cpu")
SMALL = Case(64, 16, heads=4, key_value_heads=2, head_dim=8, must_reach=6.5, stretch=5)


def test_a_case_is_measured_in_every_way_that_can_serve(tmp_path):
    rows = [measure(SMALL, name, compute, CPU) for name, compute in implementations(SMALL, CPU)]
    assert [row.implementation for row in rows] == [PUBLISHED, "sdpa"]
    cells = [dict(zip(head().splitlines()[0].split(" | "), line(row, rows).split(" | "))) for row in rows]
    assert [row["x published S²"] for row in cells] == ["1.00", f"{rows[0].both / rows[1].both:.2f}"]
    assert [(row["must reach"], row["stretch"]) for row in cells] == [("6.5", "5")] * 2
    write_json(tmp_path / "attention.json", as_json(rows, {"device": "CPU"}))
    written = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [(row["implementation"], row["both"]) for row in written] == [(row.implementation, row.both) for row in rows]


def test_full_attention_has_no_published_recipe():
    full = Case(64, None, heads=4, key_value_heads=4, head_dim=8)
    assert [name for name, _ in implementations(full, CPU)] == ["sdpa"]


def test_what_cannot_run_is_a_row_that_says_why():
    odd = Case(72, 16, heads=4, key_value_heads=4, head_dim=8)  # the recipe needs whole groups
    name, compute = next(iter(implementations(odd, CPU)))
    row = measure(odd, name, compute, CPU)
    assert row.both is None
    assert row.failure in line(row, [row])


@pytest.mark.parametrize(
    ("tokens", "group_size", "milliseconds", "rate"),
    [(32_768, 8_192, 9.19, 239), (32_768, 2_048, 4.65, 118), (98_304, 24_576, 65.7, 301), (32_768, None, 25.97, 339)],
)
def test_flops_are_counted_as_in_the_first_measurements_on_an_h200(tokens, group_size, milliseconds, rate):
    """FlashAttention-2's forward passes on an H200, timed and counted by other code.

    It counts whole groups at the two ends of the shifted heads: a share of G / 4N more.
    """
    (case,) = (c for c in CASES if (c.tokens, c.group_size, c.key_value_heads) == (tokens, group_size, 32))
    with_whole_groups = case.forward_flops / (1 - (group_size or 0) / (4 * tokens))
    assert with_whole_groups / milliseconds / 1e9 == pytest.approx(rate, rel=0.005)

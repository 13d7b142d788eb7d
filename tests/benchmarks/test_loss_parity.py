"""Two ways of training compared, and products in FP8 alone, on a CPU with the smallest of everything."""

import json

import pytest
import torch

from benchmarks import float8_products, loss_parity
from benchmarks.loss_parity import Curve, Parity, table
from tests.support.texts import write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text"), documents=20, lines=50)


def test_the_same_trial_is_trained_in_both_ways_and_drawn(texts, tmp_path, capsys):
    sizes = dict(steps=3, context_length=64, batch=2, eval_documents=1, learning_rate=1e-3)
    files = dict(json_file=tmp_path / "parity.json", picture=tmp_path / "parity.png")
    loss_parity.main("builtin:tiny", str(texts), **sizes, **files)
    found = json.loads(files["json_file"].read_text())["seeds"]["0"]
    first, second = found["curves"]
    assert (first["variant"], second["variant"]) == ("bfloat16", "fp8")
    assert len(first["losses"]) == 3 and first["losses"] != second["losses"]
    assert second["losses"] == pytest.approx(first["losses"], rel=0.1)
    assert found["parity"]["differences"][0] == pytest.approx(second["losses"][0] / first["losses"][0] - 1)
    assert first["perplexities"].keys() == {"0", "3"}
    assert first["exported"] == pytest.approx(first["perplexities"]["3"], rel=1e-6)  # the same model, loaded anew
    assert second["exported"] != second["perplexities"]["3"]
    assert files["picture"].read_bytes().startswith(b"\x89PNG")
    assert "| 1 to 3 |" in capsys.readouterr().out
    # The order of data and what LoRA begins with are the same: two runs in one way do not differ.
    loss_parity.main("builtin:tiny", str(texts), variants=("bfloat16", "not-compiled"), seeds=(0, 1), **sizes, **files)
    found = json.loads(files["json_file"].read_text())["seeds"]
    assert [found[seed]["parity"]["largest"] for seed in ("0", "1")] == [0.0, 0.0]
    ends = [found[seed]["curves"][0]["exported"] for seed in ("0", "1")]
    assert f"({max(ends) / min(ends) - 1:.3%} apart)" in capsys.readouterr().out


def test_the_differences_are_relative_to_the_first():
    first = Curve("bfloat16", [2.0, 4.0, 4.0], {0: 9.0, 3: 8.0}, 8.0, 1.0, 10.0)
    second = Curve("fp8", [2.2, 4.0, 3.8], {0: 9.0, 3: 8.4}, 8.2, 1.0, 20.0)
    parity = Parity.of(first, second)
    assert parity.differences == pytest.approx([0.1, 0.0, -0.05])
    assert (parity.median, parity.largest) == pytest.approx((0.05, 0.1))
    assert (parity.mean, parity.perplexity, parity.exported) == pytest.approx((0.05 / 3, 0.05, 0.025))
    assert "| held-out perplexity at 3 | 8.0000 | 8.4000 | +5.000% |" in table(first, second, parity)


def test_products_without_scales_are_exact_but_for_the_rounding_of_the_result():
    rows = float8_products.measure(k=128, n=32, tokens=64, device=torch.device("cpu"), repeats=1)
    for method in ("bfloat16", "no scales, fast sums", "no scales, exact sums"):
        assert rows[method]["error"] == pytest.approx(0.0017, rel=0.2)
    assert "| x | bfloat16 |" in float8_products.table({"x": rows})

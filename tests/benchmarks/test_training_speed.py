"""The table of training speeds, on a CPU with tiny shapes; its baselines against what they are said to be."""

import dataclasses
import importlib.util
import json
import re
import runpy
import sys

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import training_speed
from benchmarks.baselines import published_s2, users_model, users_step
from benchmarks.cases import ALL_WEIGHTS, CASES, PRODUCTS_RATE, Row, baseline
from benchmarks.memory import MODELS
from benchmarks.speed_picture import draw
from benchmarks.step_profile import ATTENTION, COPIES, ELEMENTWISE, IDLE, LOSS, OPTIMISER, PRODUCTS, of_trace
from benchmarks.training_speed import Results, line, measure, read, row_of, table
from benchmarks.unsloth_baseline import measure_in_process
from workloads.adaptation.methods import adapt, trainable_parameters
from workloads.attention.masks import dense_mask
from workloads.attention.patterns import AttentionPattern
from workloads.budget import ModelShape, training_flops

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip


def tiny(name):
    """A case of the table that a CPU takes in a second."""
    case = CASES[name]
    return dataclasses.replace(case, context_length=64, group_size=case.group_size and 16, warmup=1, steps=3)


# The published recipe


def stated_naively(query, key, value, group_size):
    """Head by head: tokens rolled, groups cut, causal softmax, rolled back. (heads, tokens, head_dim) each."""
    outputs = []
    for head, (q, k, v) in enumerate(zip(query, key, value)):
        moved = group_size // 2 if head >= len(query) // 2 else 0
        q, k, v = (x.roll(-moved, 0) for x in (q, k, v))
        parts = []
        for start in range(0, len(q), group_size):
            one = slice(start, start + group_size)
            scores = q[one] @ k[one].T / q.shape[-1] ** 0.5
            scores.masked_fill_(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            parts.append(scores.softmax(-1) @ v[one])
        outputs.append(torch.cat(parts).roll(moved, 0))
    return torch.stack(outputs)


def random_heads(*counts, tokens=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, tokens, 8, generator=generator, dtype=torch.float64) for count in counts]


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_the_published_recipe_equals_a_naive_statement_of_it(key_value_heads):
    query, key, value = random_heads(4, key_value_heads, key_value_heads)
    shared = [x[0].repeat_interleave(4 // key_value_heads, 0) for x in (key, value)]
    expected = stated_naively(query[0], *shared, group_size=8)
    torch.testing.assert_close(published_s2(query, key, value, 8)[0].transpose(0, 1), expected)


def test_the_published_recipe_differs_from_the_definition_in_one_group_which_sees_the_future():
    query, key, value = random_heads(4, 4, 4)
    mask = dense_mask(AttentionPattern(name="s2", group_size=8), 4, 32)
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~mask, float("-inf"))
    defined = (scores.softmax(-1) @ value).transpose(1, 2)
    differs = ((published_s2(query, key, value, 8) - defined).abs().amax((0, 3)) > 1e-9).nonzero().tolist()
    assert differs == [[token, head] for token in range(4) for head in (2, 3)]


@pytest.mark.parametrize("group_size", [None, 8])
def test_the_stock_model_attends_as_asked(group_size):
    """Seen by its leak, which the stock model does not have.

    In the first of two layers the last token reaches the first half group; in the second, from there, the first
    group's other half.
    """
    model = users_model(CONFIG, CPU, "full", group_size).float().eval()
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        logits = [model(torch.cat((tokens[:, :-1], torch.tensor([[last]])), 1)).logits[0] for last in (1, 2)]
    changed = (logits[0] != logits[1]).any(-1).nonzero().flatten().tolist()
    assert changed == ([31] if group_size is None else [*range(8), 31])


# The user's way


def test_the_users_way_trains_what_longspan_trains():
    theirs = trainable_parameters(users_model(CONFIG, CPU))
    model = users_model(CONFIG, CPU, "full").float()
    ours = trainable_parameters(adapt(model, "lora+"))
    assert {name: each.shape for name, each in theirs.items()} == {name: each.shape for name, each in ours.items()}
    kinds = {re.sub(r"\d+", "N", name.removesuffix(".weight")).rpartition("model.")[2] for name in theirs}
    lora = {f"layers.N.self_attn.{p}_proj.lora_{m}.default" for p in "qkvo" for m in "AB"}
    norms = {"layers.N.input_layernorm", "layers.N.post_attention_layernorm", "norm"}
    assert kinds == lora | norms | {"embed_tokens"}


def test_the_users_way_is_bfloat16_with_gradient_checkpointing_and_the_stock_attention():
    model = users_model(CONFIG, CPU)
    assert model.is_gradient_checkpointing
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    kinds = {name: each.dtype for name, each in model.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if "lora" in name} == {torch.float32}  # PEFT's default
    assert {dtype for name, dtype in kinds.items() if "lora" not in name} == {torch.bfloat16}


def test_a_users_step_updates_what_trains_and_nothing_else():
    model = users_model(CONFIG, CPU)
    before = {name: each.clone() for name, each in model.named_parameters()}
    step = users_step(model, 64)
    for _ in range(3):
        step()
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert moved <= set(trainable_parameters(model))
    assert {name for name in before if "lora" in name} <= moved


# The table


@pytest.fixture(scope="module")
def rows():
    names = ("8k-s2", "8k-s2-fp8", "8k-user", "8k-published", "8k-s2-all-weights")
    return {name: measure(tiny(name), CONFIG, CPU) for name in names}


def test_every_way_is_measured(rows):
    for name, row in rows.items():
        assert (row.case, row.outcome, len(row.seconds)) == (name, "measured", 3)
        assert row.tokens_per_second == pytest.approx(64 / sorted(row.seconds)[1])
    assert rows["8k-s2"].settings["attention_backend"] == "sdpa"


def test_the_table_holds_each_speed_beside_what_it_is_compared_with(rows):
    cells = [text.strip("| ").split(" | ") for text in table(rows).splitlines()]
    head, _, ours, _, users, published, _ = cells
    ours, users, published = (dict(zip(head, row)) for row in (ours, users, published))
    speed = rows["8k-s2"].tokens_per_second
    assert ours["tokens/s"] == f"{speed:,.0f}"
    assert ours["x user's way"] == f"{speed / rows['8k-user'].tokens_per_second:.2f}"
    assert ours["x published S²"] == f"{speed / rows['8k-published'].tokens_per_second:.2f}"
    assert (ours["must reach"], ours["stretch"], ours["limit"]) == ("19,500", "21,500", "24,288")
    assert (users["must reach"], users["limit"]) == ("-", "20,248")
    assert published["group"] == "2,048"


def test_what_ran_out_of_memory_is_a_row_that_says_so(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training_speed, "longspans_step", out_of_memory)  # no CPU can be made to run out in a test
    row = measure(tiny("8k-s2"), CONFIG, CPU)
    assert line(CASES["8k-s2"], row, {}).endswith("| out of memory |")
    assert row.reason == "CUDA out of memory"


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="for a machine without Unsloth")
def test_a_process_of_its_own_that_fails_is_a_row_that_says_why():
    row = row_of(CASES["8k-unsloth"], CONFIG, CPU, **measure_in_process(64, 1, 1, seconds=60))
    assert row.outcome == "its process ended with 1: ModuleNotFoundError: No module named 'unsloth'"
    assert line(CASES["8k-unsloth"], row, {}).endswith(f"| {row.outcome} |")


def test_tried_again_a_case_takes_less_memory(rows):
    row = measure(tiny("8k-s2"), CONFIG, CPU, smaller=True)
    assert row.outcome == "measured"
    assert (rows["8k-s2"].settings.get("gradient_checkpointing", 0), row.settings["gradient_checkpointing"]) == (0, 2)
    assert line(CASES["8k-s2"], dataclasses.replace(row, reason="CUDA out of memory"), {}).endswith("second attempt |")


def test_a_second_call_goes_on_where_the_first_ended(rows, tmp_path):
    path, facts = tmp_path / "speed.json", {"device": "NVIDIA H200", "torch": "2.11"}
    first = Results(path, facts)
    first.add(rows["8k-s2"])
    first.add(Row(case="8k-full", outcome="out of memory"))
    first.add(Row(case="8k-user", outcome="its process ended with -9"))
    again = Results(path, facts)
    assert again.rows == first.rows
    assert {"8k-s2", "8k-full", "8k-user"} - set(again.missing(profile=False)) == {"8k-s2", "8k-full"}
    assert "8k-s2" in again.missing(profile=True)  # it has no profile yet
    implementations = {CASES[name].implementation for name in again.missing(profile=False)}
    assert implementations == {"longspan", "user's way", "published S²"}  # the others are not installed
    with_all = Results(tmp_path / "other.json", facts | {"liger-kernel": "0.6", "unsloth": "2026.10"})
    assert set(with_all.missing(profile=False)) == set(CASES)
    with pytest.raises(SystemExit, match=r"\(torch differ\)"):
        Results(path, facts | {"torch": "2.12"})


def test_the_json_stands_alone(rows, tmp_path):
    results = Results(tmp_path / "speed.json", {"device": "NVIDIA H200"})
    results.add(rows["8k-s2"])
    row = json.loads((tmp_path / "speed.json").read_text())["rows"]["8k-s2"]
    assert (row["implementation"], row["context_length"], row["group_size"]) == ("longspan", 8192, 2048)
    assert (row["must_reach"], row["limit"]) == (19_500, 24_288)
    assert row["tokens_per_second"] == rows["8k-s2"].tokens_per_second


def test_every_case_of_longspan_is_compared_with_the_users_way():
    ours = [case for case in CASES.values() if case.must_reach]
    assert all(baseline(case, "user's way") for case in ours)
    assert {case.name for case in ours if baseline(case, "published S²")} == {
        "8k-s2", "8k-s2-fp8", "32k-s2", "98k-s2",
    }  # fmt: skip
    assert all(case.expected < case.stretch < case.limit for case in ours)


def test_limits_are_those_of_the_flops():
    """The limit of all weights is computed, and its 60% stated; the other limits are below their FLOPs alone."""
    assert ALL_WEIGHTS["expected"] == pytest.approx(0.6 * CASES["8k-s2-all-weights"].limit, rel=1e-3)
    shape = ModelShape.of(MODELS["7B"])
    for case in CASES.values():
        if case.method == "lora+":
            flops_alone = PRODUCTS_RATE * case.context_length / training_flops(shape, case.training).total
            in_bfloat16 = CASES[case.name.removesuffix("-fp8")].limit
            assert 0.7 * flops_alone < in_bfloat16 < flops_alone
    # By hand: 41.2 µs a token, of which 20.9 GFLOP take 26.5 in bfloat16 and half of it in FP8.
    assert CASES["8k-s2-fp8"].limit == pytest.approx(1e6 / (41.17 - 26.50 / 2), rel=1e-3)


def test_the_picture_is_drawn_from_the_json(rows, tmp_path):
    facts = {"device": "NVIDIA H200", "torch": "2.11", "transformers": "5.17", "peft": "0.21"}
    results = Results(tmp_path / "speed.json", facts)
    with pytest.raises(SystemExit, match="no measured case"):
        draw(facts, results.rows, tmp_path / "speed.png")
    for row in rows.values():
        results.add(row)
    draw(*read(tmp_path / "speed.json"), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("module", ["training_speed", "attention_speed"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a CUDA device")
def test_without_a_gpu_the_command_says_so_in_one_line(module, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{module}", run_name="__main__")
    assert str(ended.value) == f"benchmarks.{module} needs a CUDA device; torch finds none here"


# The profile


def test_the_time_of_a_step_is_divided_among_its_parts():
    """Kernels by the names that torch 2.11, cuDNN, cuBLAS, FlashAttention, Liger and Triton give them on an H200."""
    launched = {1: [[8192, 4096], [4096, 32000]], 2: [[8192, 4096], [4096, 4096]], 3: [[32000, 4096], [1, 8192]]}
    kernels = [
        ("nvjet_tst_320x128_64x3_1x2_h_bz_coopB_NNT", 2, PRODUCTS),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", 2, PRODUCTS),
        ("nvjet_tst_320x128_64x3_1x2_h_bz_coopB_NNT", 1, LOSS),
        ("liger_cross_entropy_kernel", None, LOSS),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", None, ATTENTION),
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", None, ATTENTION),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", None, ELEMENTWISE),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", 3, ELEMENTWISE),
        ("void at::native::elementwise_kernel<at::native::direct_copy_kernel_cuda>", 2, COPIES),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", None, OPTIMISER),
    ]
    events = [{"cat": "cpu_op", "name": "op", "args": {"External id": i, "Input Dims": d}} for i, d in launched.items()]
    events.append({"cat": "gpu_user_annotation", "name": "ProfilerStep", "ts": 0, "dur": 10_000, "args": {}})
    events.append({"ph": "M", "name": "process_name", "args": {"name": "python"}})
    for index, (name, operator, _) in enumerate(kernels):
        args = {} if operator is None else {"External id": operator}
        events.append({"cat": "kernel", "name": name, "ts": 1000 * index, "dur": 2**index, "args": args})
    events.append({"cat": "gpu_memset", "name": "Memset (Device)", "ts": 100_000, "dur": 4096, "args": {}})
    events.append({"cat": "kernel", "name": "elementwise", "ts": 102_000, "dur": 1000, "args": {}})  # beside it
    found = of_trace(events, 32_000, milliseconds=10.0, steps=2)
    expected = dict.fromkeys(found.parts, 0.0)
    for index, (_, _, part) in enumerate(kernels):
        expected[part] += 2**index / 2000
    expected[COPIES] += 4096 / 2000
    expected[ELEMENTWISE] += 1000 / 2000
    expected[IDLE] = (10_000 - (2 ** len(kernels) - 1) - 4096) / 2000
    assert found.parts == pytest.approx(expected)
    assert next(iter(found.longest)) == "Memset (Device)"

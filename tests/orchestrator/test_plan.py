"""What a sweep would take, before it runs: for a cluster that is not there; refused, fitted, kept in budget."""

import io
import json
import re
import shutil

import pytest
from rich.console import Console

from orchestrator import plan as planning
from orchestrator.cli import parse
from orchestrator.planning.budget_watch import BudgetWatch, Spending
from orchestrator.planning.cluster import Cluster, Node
from orchestrator.planning.plan_table import print_plan
from orchestrator.planning.preparation import check_sweep, identify
from orchestrator.planning.sweep_plan import plan_sweep
from orchestrator.records.events import Finished, Launched, ModelReady, Saved, Started, Step
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.run_options import RunOptions
from orchestrator.terminal import duration
from tests.support.events import a_step
from workloads.data import Corpus


@pytest.fixture
def plan(tmp_path, text_folder, capsys, monkeypatch):
    """(exit status, everything printed) of ``python -m orchestrator.plan RECIPE`` on a folder of texts.

    Without a recipe it is convergence.
    """
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags):
        recipe = [] if flags and not flags[0].startswith("-") else ["convergence"]
        status = planning.main([*recipe, *flags, "--data", str(text_folder), "--storage", str(tmp_path / "runs")])
        captured = capsys.readouterr()
        return status, " ".join((captured.out + captured.err).split())

    return run


def test_a_cluster_that_is_not_there_is_planned_for_with_its_price(plan, tmp_path):
    status, printed = plan("--cluster", "aws-p4d", "--context-lengths", "4096")
    assert status == 0
    assert "6 trials: 6 to run" in printed
    assert "of 39 GiB" in printed and "on 16 x NVIDIA A100-SXM4-40GB" in printed
    assert "21.96 USD an hour of a machine, p4d.24xlarge on demand" in printed
    assert not list((tmp_path / "runs").glob("data/*")) and not list((tmp_path / "runs").glob("sweeps/*"))


def test_nothing_but_the_plan_is_made(plan, monkeypatch):
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("the corpus was read to its end"), raising=False)
    assert plan()[0] == 0


def test_what_does_not_fit_is_fitted_and_refused_on_request_with_what_would(plan):
    # 64 sequences of 64k tokens at once: hundreds of GiB of activations.
    too_large = ("--cluster", "aws-p4d", "--context-lengths", "65536", "--batch", "64", "--methods", "lora+")
    status, printed = plan(*too_large, "--references", "--no-fit")
    assert status == 2
    assert "error: 1 of 1 trials do not fit into memory: lora+ 65536: needs more than the 39.4 GiB of" in printed
    assert "micro-batches of" in printed and "would make it fit (--fit)" in printed
    assert "to do" not in printed and " USD" not in printed.replace("h USD", ""), "nothing can run, so nothing costs"
    status, printed = plan(*too_large, "--references")
    assert status == 0 and "[1] runs with micro-batches of" in printed and "error" not in printed


def test_on_gpus_as_few_layers_recompute_as_it_takes_and_others_on_request(plan):
    """builtin:tiny has four layers."""
    flags = ("--cluster", "aws-p4d", "--context-lengths", "65536", "--methods", "lora+", "--references")

    def recomputed(batch, *more):
        status, printed = plan(*flags, *(() if "--fit" in more else ("--no-fit",)), "--batch", str(batch), *more)
        return re.search(r"GiB (none|\d of 4) ", printed)[1] if status == 0 else "refused"

    chosen = {batch: recomputed(batch) for batch in (1, 16, 24, 32, 64)}
    assert chosen[1] == "none" and chosen[64] == "refused"
    batch, number = next((batch, int(layers[0])) for batch, layers in chosen.items() if layers[0] in "123")
    assert recomputed(batch, "--gradient-checkpointing", str(number)) == chosen[batch]
    assert recomputed(batch, "--gradient-checkpointing", str(number - 1)) == "refused"
    assert recomputed(1, "--gradient-checkpointing", "all") == "4 of 4"
    assert recomputed(batch, "--gradient-checkpointing", "none") == "refused"
    assert recomputed(batch, "--fit") == "none", "smaller micro-batches cost less"
    status, printed = plan(*flags, "--gradient-checkpointing", "5")
    assert status == 2 and "gradient_checkpointing is 5, but the model has 4 layers" in printed


def test_on_a_cpu_nothing_is_recomputed_unless_asked_for(plan):
    assert "GiB none" in plan("--methods", "lora")[1]
    assert "GiB 2 of 4" in plan("--methods", "lora", "--gradient-checkpointing", "2")[1]


def test_layers_that_are_offloaded_are_shown_and_refused_beyond_the_hosts_memory(plan):
    flags = ("--methods", "lora", "--offload-activations")
    assert "GiB none, 2 offloaded" in plan(*flags, "2")[1]
    assert "GiB 1 of 4, 2 offloaded" in plan(*flags, "2", "--gradient-checkpointing", "1")[1]
    assert " offloaded" not in plan(*flags, "auto")[1] + plan(*flags, "none")[1]
    status, printed = plan(*flags, "5")
    assert status == 2 and "offload_activations is 5, but the model has 4 layers" in printed
    # 64 sequences of 524,288 tokens at once, in 1,152 GiB of the host among 8 workers.
    large = ("--cluster", "aws-p4d", "--context-lengths", "524288", "--batch", "64", "--references")
    status, printed = plan(*flags, "3", *large)
    assert status == 2 and "GiB of host memory for each worker" in printed


def test_a_budget_refuses_what_takes_more_and_what_cannot_be_known(plan):
    assert plan("--budget-hours", "100")[0] == 0
    status, printed = plan("--budget-hours", "0.001")
    assert status == 2 and "--budget-hours 0.001: the rest of this sweep takes about" in printed
    status, printed = plan("--budget-usd", "1")
    assert status == 2 and "give --price-per-hour" in printed
    assert plan("--budget-usd", "1", "--price-per-hour", "0.05")[0] == 0


def test_an_fp8_base_is_planned_for_gpus_that_have_it_and_for_cpus_in_bfloat16(plan, monkeypatch):
    flags = ("--context-lengths", "1024", "--methods", "lora+", "--references", "--quantization", "fp8")
    gpus = [("NVIDIA A100-SXM4-80GB", 79.2 * 2**30)]
    monkeypatch.setattr("orchestrator.planning.cluster.visible_gpus", lambda: gpus)
    status, printed = plan(*flags)
    assert status == 2 and "--quantization fp8 needs GPUs that multiply in FP8" in printed
    assert "NVIDIA A100-SXM4-80GB does not; leave it out" in printed
    gpus[:] = [("NVIDIA H200", 139.8 * 2**30)]
    status, printed = plan(*flags)
    assert status == 0 and "1 to run" in printed
    gpus.clear()
    assert plan(*flags, "--precision", "bfloat16")[0] == 0
    status, printed = plan(*flags, "--precision", "float32")
    assert status == 2 and "choose precision bfloat16" in printed


def test_an_unknown_cluster_is_named_with_the_known_ones(plan):
    status, printed = plan("--cluster", "aws-p4")
    assert status == 2 and "aws-p4d" in printed


def write_trial(storage, trial, tokens_per_second, finished=True, hardware="1 x 1 CPU thread (this one)"):
    journal = storage.add_trial(trial).journal
    journal.append(Launched())
    # As an earlier version wrote it, which knew all layers or none.
    journal.append(Started(hardware=hardware, workers=1, execution={"gradient_checkpointing": False}))
    journal.append(ModelReady(parameters=1, trainable_parameters=1))
    for step in (1, 2, 3):
        journal.append(Step(**a_step(step) | {"seconds": 1.0, "tokens_per_second": tokens_per_second}))
    journal.append(Saved(step=3))
    if finished:
        journal.append(Finished())
    return TrialRecord.of(journal)


def test_speeds_are_those_that_trials_here_have_had_and_finished_ones_cost_nothing(
    plan, tmp_path, text_folder, monkeypatch
):
    monkeypatch.setattr("orchestrator.planning.cluster.cpu_name", lambda: "this one")
    flags = ("--methods", "lora", "full", "--references", "--context-lengths", "2048", "--steps", "30")
    _, before = plan(*flags)
    trials = trials_of(tmp_path, text_folder, flags)
    assert "peak times an efficiency" in before
    storage = Storage.open(str(tmp_path / "runs"))
    write_trial(storage, trials["lora 2048"], 1234.0)
    status, printed = plan(*flags)
    assert status == 0 and "2 trials: 1 to run, 1 already finished" in printed
    assert "speeds measured by 1 trial here on this hardware" in printed
    assert "infeasible" not in printed and "lora 2048 known - - - - - - -" in printed
    write_trial(storage, trials["full 2048"], 777.0, finished=False)
    _, printed = plan(*flags)
    assert "full 2048 resume" in printed and "777" in printed and "from step 3 of 30" in printed


def trials_of(tmp_path, text_folder, flags):
    """The trials of a sweep by their labels."""
    sweep = parse(["convergence", *flags, "--data", str(text_folder), "--storage", str(tmp_path / "runs")])
    return {trial.label: trial for trial in plan_sweep(identify(check_sweep(*sweep)), Cluster.this_machine()).trials}


def test_workers_are_counted_machine_by_machine():
    a100 = Node(cpus=96, gpus=8, memory=2**40, gpu="NVIDIA A100-SXM4-40GB", gpu_memory=40 * 2**30)
    small = Node(cpus=4, gpus=1, memory=2**36, gpu="NVIDIA L4", gpu_memory=22 * 2**30)
    cluster = Cluster((Node(cpus=8, memory=2**34), a100, small))
    assert cluster.slots_by_node(RunOptions()) == (0, 8, 1)
    assert cluster.slots_by_node(RunOptions(gpus_per_worker=0.25)) == (0, 32, 4)
    assert cluster.slots_by_node(RunOptions(gpus_per_worker=2)) == (0, 4, 0)
    assert cluster.slots_by_node(RunOptions(cpus_per_worker=8)) == (0, 8, 0)
    assert cluster.device(RunOptions()).name == "NVIDIA L4", "what is planned fits wherever it comes to run"
    unknown = Cluster((Node(cpus=8, gpus=1, memory=2**34, gpu="A GPU of tomorrow", gpu_memory=2**36),))
    assert unknown.device(RunOptions()).memory == 2**36 and unknown.device(RunOptions()).bfloat16 == 0


def test_bfloat16_is_taken_where_every_machine_that_trains_is_fast_in_it():
    slow, fast, head = Node(cpus=2), Node(cpus=2, bfloat16=True), Node(cpus=0)
    assert [Cluster(nodes).precision for nodes in ((slow,), (fast, head), (fast, slow))] == [
        "float32", "bfloat16", "float32",
    ]  # fmt: skip
    assert Cluster((Node(cpus=8, gpus=1),)).precision == "bfloat16"


def test_a_gpu_without_a_known_speed_is_planned_for_by_its_memory(plan, monkeypatch):
    monkeypatch.setattr("orchestrator.planning.cluster.visible_gpus", lambda: [("A GPU of tomorrow", float(2**36))])
    status, printed = plan("--methods", "lora")
    assert status == 0 and "time unknown" in printed and "the speed of A GPU of tomorrow is unknown" in printed


@pytest.mark.parametrize(("seconds", "words"), [(5, "5s"), (125, "2m05s"), (7500, "2h05m"), (200_000, "2d07h")])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_a_running_sweep_stops_when_it_has_come_to_its_budget_and_others_hours_are_not_its_own(
    tmp_path, text_folder, monkeypatch
):
    flags = ("--methods", "lora", "full", "--references", "--context-lengths", "2048", "--steps", "30")
    trials = list(trials_of(tmp_path, text_folder, flags).values())
    storage = Storage.open(str(tmp_path / "runs"))
    journals = [storage.add_trial(trial).journal for trial in trials]

    def attempt(journal, sweep, hours):
        journal.append(Started(sweep=sweep, workers=1, devices=2, usd_per_device_hour=3.0))
        began = journal.read().events[-1].time
        with journal.path.open("a") as file:  # a line of that much later
            file.write(json.dumps({"event": "saved", "step": 5, "time": began + 3600 * hours}) + "\n")

    attempt(journals[0], "another", 100.0)
    attempt(journals[0], "mine", 0.5)
    reasons = []
    monkeypatch.setattr("orchestrator.planning.budget_watch.POLL_S", 0.05)
    options = RunOptions(budget_usd=10.0, budget_hours=1000.0)
    spending = Spending("mine", storage)
    with BudgetWatch(spending, trials, options, reasons.append) as watch:
        assert spending.so_far(trials) == (pytest.approx(1.0), pytest.approx(3.0))  # two devices for half an hour
        watch._thread.join(0.5)  # it looks ten times, and goes on
        assert not reasons and watch._thread.is_alive()
        attempt(journals[1], "mine", 2.0)
        watch._thread.join(300)
    assert reasons == ["--budget-usd 10: 15 spent"], "once is enough"


def test_names_of_others_are_not_taken_for_markup(tmp_path, text_folder, capsys):
    data = tmp_path / "da[/b]\x1b[2J"
    shutil.copytree(text_folder, data)
    assert planning.main(["--cluster", "aws-p4d", "--data", str(data), "--storage", str(tmp_path / "ru[/]ns")]) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert r"da[/b]\x1b[2J" in printed and "ru[/]ns" in printed and "\x1b" not in printed


LLAMA = ("convergence-llama2-7b", "--cluster", "aws-p4d", "--methods", "lora", "full", "--context-lengths", "8192")


@pytest.fixture(scope="module")
def offline_plans(tmp_path_factory):
    """What the plan of the README prints without the hub, by width of the terminal."""
    storage, printed = tmp_path_factory.mktemp("offline"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
        patch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
        sweep, plan = planning.make_plan(*parse([*LLAMA, "--storage", str(storage), "--steps", "100"]))
    for width in (60, 80, 120, 200):
        console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
        print_plan(sweep, plan, console)
        printed[width] = console.file.getvalue()
    return printed


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_7b_plan_needs_no_hub_and_is_cut_off_at_no_width(offline_plans, width):
    printed = offline_plans[width]
    lines = [line.rstrip() for line in printed.splitlines()]
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    whole, widest = (re.sub(r"\s+", " ", text) for text in (printed, offline_plans[200]))
    assert "note: the hub does not give meta-llama/Llama-2-7b-hf and emozilla/pg19" in whole
    for row in re.findall(r"^((?:untuned|lora|full)\S* (?:\w+ )?\d+) +run +(.*?)$", offline_plans[200], re.M):
        label, cells = row
        assert f"{label} run" in re.sub(" +", " ", printed)
        for number in re.findall(r"[\d,.]+(?:[dhm]\d+[hms])?", cells):
            assert number in whole, (label, number)
    assert "[1] runs with micro-batches of 1, to fit into memory [2] runs with 8 workers, " in whole
    assert whole[whole.index("to do: ") :] == widest[widest.index("to do: ") :]


def test_the_total_is_of_whole_machines_and_the_head_by_hand(plan):
    """One trial on one GPU: a machine of 8 at 21.957642 USD an hour and the head at 0.768, as long as it runs."""
    flags = ("--cluster", "aws-p4d", "--context-lengths", "4096", "--methods", "lora", "--references")
    _, printed = plan(*flags, "--steps", "100000")
    hours = float(re.search(r"billed: ([\d.,]+) hours of 1 machine,", printed)[1].replace(",", ""))
    total, gpu_hours = re.search(r"([\d.,]+) GPU hours, ([\d.,]+) USD", printed).group(2, 1)
    assert float(gpu_hours) == pytest.approx(hours, abs=0.01)
    assert float(total) == pytest.approx(hours * (21.957642 + 0.768), rel=0.01)
    assert "at most 22.73 USD an hour" in printed
    assert "spot usually costs less" in printed and "0.77 USD an hour of the head, m6i.4xlarge" in printed


def test_a_machines_own_price_and_a_cap_an_hour(plan, tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text('"p4d.24xlarge" = 20.0\n"p4d.24xlarge spot" = 8.0\n"m6i.4xlarge" = 1.0\n')
    flags = ("--cluster", "aws-p4d", "--context-lengths", "4096", "--methods", "lora", "full", "--references")
    flags += ("--workers", "8", "--batch", "8", "--prices", str(prices))
    _, printed = plan(*flags)
    assert "of 2 machines, idle GPUs included, at most 17.00 USD an hour" in printed
    status, printed = plan(*flags, "--budget-usd-per-hour", "16.99")
    assert status == 0 and "of 1 machine, idle GPUs included, at most 9.00 USD an hour" in printed
    assert "on 8 x NVIDIA A100" in printed
    status, printed = plan(*flags, "--budget-usd-per-hour", "8.99")
    assert status == 2 and "one machine and the head cost 9 US dollars an hour" in printed


def test_a_partial_total_says_how_many_trials_it_covers(plan):
    flags = ("--cluster", "aws-p4d", "--context-lengths", "4096", "524288", "--batch", "64", "--methods", "lora")
    status, printed = plan(*flags, "--references", "--no-fit")
    assert status == 2 and "to do for 1 of 2 trials: about" in printed


def test_a_better_number_of_workers_is_what_a_plan_with_it_says(tmp_path, monkeypatch, capsys):
    flags = ("--cluster", "aws-p4d", "--context-lengths", "16384", "--methods", "lora", "--references", "--batch", "8")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("model_info", "dataset_info"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))

    def plan_with(*more):
        assert planning.main(["convergence-llama2-7b", *flags, "--storage", str(tmp_path / "runs"), *more]) == 0
        return capsys.readouterr().out

    before = plan_with()
    total = r"to do: about (\S+), .* hours, ([\d,.]+ USD),"
    workers, time, was, paid, had = re.search(
        r"better: (\d) workers a trial \(--workers \d\): (\S+) instead of (\S+), (.* USD) instead of (.* USD)", before
    ).groups()
    assert re.search(total, before).groups() == (was, had)
    after = plan_with("--workers", workers)
    assert re.search(total, after).groups() == (time, paid)
    assert "better:" not in after

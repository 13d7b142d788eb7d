"""Every engine trains the same trial: alone, DDP, ZeRO-2 and ZeRO-3, here with two processes over gloo.

With two GPUs, ``-m gpu`` runs the same over NCCL.
"""

import importlib.util
import math
import shutil
import sys

import pytest
import torch
import torch.distributed as dist

from tests.support.workers import run_workers, this_device
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import Corpus, PackedCorpus, prepare
from workloads.engines.choose import make_engine
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.source import ModelSource
from workloads.training import compilation, loss, offload
from workloads.training.checkpoint import load_checkpoint
from workloads.training.loop import NonFiniteLoss, Trial, run
from workloads.training.setup import build_model

pytestmark = pytest.mark.workers
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ENGINES = ["ddp", *(pytest.param(engine, marks=needs_deepspeed) for engine in ("zero2", "zero3"))]
# How much rounding moves losses and weights: on a GPU sums come in another order each time.
LOSSES = {"cpu": {"rel": 1e-4}, "cuda": {"rel": 1e-3}}
WEIGHTS = {"cpu": {"rtol": 1e-3, "atol": 1e-5}, "cuda": {"rtol": 1e-2, "atol": 1e-3}}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_two_gpus])]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with sizes that do not divide among two workers: 33 hidden, a vocabulary of 265."""
    from tests.support.models import small_llama  # transformers, which the workers import in their own time

    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 33, "intermediate_size": 67, "num_attention_heads": 3, "num_key_value_heads": 3}
    small_llama(
        **sizes, head_dim=16, vocab_size=265, max_position_embeddings=64, initializer_range=0.2
    ).save_pretrained(folder)
    return ModelSource.parse(str(folder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a packed corpus: few lines, so that a random model learns them in a few steps."""
    text = tmp_path_factory.mktemp("text")
    for number in range(12):
        (text / f"{number}.txt").write_text(f"number {number} is followed by {number + 1}\n" * 100)
    tiny = ModelSource.parse("builtin:tiny")
    packed = prepare(Corpus.parse(str(text)), tiny.tokenizer, tiny.tokenizer_identity, tmp_path_factory.mktemp("data"))
    return packed.folder


def trial(source, corpus, folder, device, engine="auto", execution=None, **overrides):
    """A trial of five steps that saves after the second, the fourth and the last, ready to run on this worker."""
    values = {
        "context_length": 128, "method": "lora+", "attention": "full", "steps": 5, "batch": 6, "learning_rate": 1e-2,
        "warmup_steps": 2, "max_grad_norm": 2.0, "eval_every": 2, "eval_documents": 3, "eval_span": 128,
    }  # fmt: skip
    if "method" not in overrides:
        values |= {"learning_rate_embeddings": 3e-3, "learning_rate_norms": 3e-3}  # several parameter groups
    config = TrainingConfig(**{**values, **overrides})
    execution = ExecutionConfig(checkpoint_every=2, engine=engine, **execution or {})
    worker = make_engine(execution, this_device(device), config.precision)
    events = []
    return Trial(
        build_model(source, config, worker, execution), config, execution, PackedCorpus.open(corpus), folder, worker,
        lambda event, **fields: events.append({"event": event, **fields}),
    ), events  # fmt: skip


def train(*args, **kwargs):
    """The losses and gradient norms by step, and the perplexities of a whole run."""
    trained, events = trial(*args, **kwargs)
    trained.run()
    steps = [event for event in events if event["event"] == "step"]
    frozen = [parameter for parameter in trained.model.parameters() if not parameter.requires_grad]
    return {
        "loss": {event["step"]: event["loss"] for event in steps},
        "grad_norm": {event["step"]: event["grad_norm"] for event in steps},
        "perplexity": [event["perplexity"] for event in events if event["event"] == "eval"],
        "frozen": sorted({str(getattr(p, "ds_tensor", p).dtype) for p in frozen}),
    }


def train_poisoned(what, *args, **kwargs):
    """What a worker says of a run in whose third step the second worker alone meets a NaN; and its weights then."""
    trained, _ = trial(*args, **kwargs)

    def poison(*values):
        return values[-1] * float("nan") if trained.step == 2 and trained.model.training else None

    if trained.engine.rank == 1 and what == "gradient":
        next(p for p in trained.model.parameters() if p.requires_grad).register_hook(poison)
    elif trained.engine.rank == 1:
        trained.model.get_output_embeddings().register_forward_hook(poison)
    try:
        trained.run()
        said = "nothing"
    except NonFiniteLoss as error:
        said = str(error)
    return {"said": said, "weights": {name: tensor.cpu() for name, tensor in trained.engine.weights().items()}}


def fail_to_save(*args):
    """What a worker says of a run whose checkpoints cannot be written."""
    trained, _ = trial(*args)
    try:
        trained.run()
    except OSError as error:
        return str(error)


def saved_by_the_clock(model, corpus, folder, device, engine):
    """The steps that this worker saves if the clock of worker 0 alone always says so."""
    minutes = 1e-9 if dist.get_rank() == 0 else math.inf
    execution = {"checkpoint_minutes": minutes}
    trained, events = trial(model, corpus, folder, device, engine, execution=execution, steps=3, method="lora")
    trained.run()
    return [event["step"] for event in events if event["event"] == "saved"]


@pytest.fixture(scope="module", params=DEVICES)
def alone(request, model, corpus, tmp_path_factory):
    """One worker without any engine: the reference."""
    folder, device = tmp_path_factory.mktemp("alone"), request.param
    whole = train(model, corpus, folder, device)
    reduced = train(model, corpus, folder / "bfloat16", device, precision="bfloat16")
    full = train(model, corpus, folder / "full", device, method="full")
    return {"device": device, "folder": folder, **whole, "full": full, "bfloat16": reduced}


@pytest.fixture(scope="module", params=ENGINES)
def together(request, alone, model, corpus, tmp_path_factory):
    """What two workers say of every run below; starting processes is what takes the time."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "a file").touch()
    (folder / "alone").mkdir()
    shutil.copytree(alone["folder"] / "step-00000004", folder / "alone" / "step-00000004")
    said = run_workers(folder, alone["device"], every_run, request.param, model, corpus, folder, alone["device"])
    return {"folder": folder, "workers": said, **said[0]}


def every_run(engine, model, corpus, folder, device):
    loss.CHUNK_LOGITS = 150 * 265  # of a worker's 384 tokens; the reference has them in one chunk

    def go(name, **kwargs):
        return train(model, corpus, folder / name, device, engine, **kwargs)

    runs = {
        "plain": go("plain"),
        "micro_batch": go("micro_batch", execution={"micro_batch": 2, "gradient_checkpointing": "all"}),
        "full": go("full", method="full"),
        "bfloat16": go("bfloat16", precision="bfloat16"),
        "alone": go("alone"),
        "untuned": go("untuned", method="untuned", steps=0),
        "clock": saved_by_the_clock(model, corpus, folder / "clock", device, engine),
        "unwritable": fail_to_save(model, corpus, folder / "a file", device, engine),
    }
    if engine != "zero3":
        compilation.BACKEND = "aot_eager"  # what the compiler captures, computed without its kernels
        runs["compiled"] = go("compiled", execution={"compile_layers": "on"})  # one shape: compiling takes seconds
    if engine == "ddp":
        offload.SMALLEST = 1  # byte
        runs["activations"] = go("activations", execution={"micro_batch": 2, "offload_activations": 1})
    else:
        runs["offload"] = go("offload", execution={"micro_batch": 2, "offload": True})
    for what in ("loss", "gradient"):
        runs[what] = train_poisoned(what, model, corpus, folder / what, device, engine)
    return runs


def tensors_of(folder, step, kind=("model/", "optimizer/")):
    tensors, _ = load_checkpoint(folder, step)
    return {name: tensor for name, tensor in tensors.items() if name.startswith(kind)}


@pytest.mark.parametrize("how", ["plain", "micro_batch", "compiled", "offload", "activations"])
def test_two_workers_train_what_one_trains(alone, together, how):
    """Losses, the norm over all workers' gradients (some are clipped, some not), and perplexities.

    A worker's share of three sequences makes micro-batches of two and one.
    """
    if how not in together:
        pytest.skip("ZeRO alone offloads what it shares out, and no activations; ZeRO-3 compiles no layers")
    for what in ("loss", "grad_norm", "perplexity"):
        assert together[how][what] == pytest.approx(alone[what], **LOSSES[alone["device"]])
    assert min(alone["grad_norm"].values()) < 2 < max(alone["grad_norm"].values())


def test_two_workers_train_everything_as_one_does(alone, together):
    """The output layer too, whose gradient adds up over the chunks of the loss."""
    for what in ("loss", "grad_norm", "perplexity"):
        assert together["full"][what] == pytest.approx(alone["full"][what], **LOSSES[alone["device"]])


def test_the_precision_of_a_gpu_trains_the_same_under_every_engine(alone, together):
    """Frozen weights and computation in bfloat16, what trains in float32."""
    assert together["bfloat16"]["loss"] == pytest.approx(alone["bfloat16"]["loss"], rel=5e-3)
    assert {tensor.dtype for tensor in tensors_of(together["folder"] / "bfloat16", 5).values()} == {torch.float32}
    assert together["bfloat16"]["frozen"] == alone["bfloat16"]["frozen"] == ["torch.bfloat16"]


def test_two_workers_score_an_untuned_model_as_one_does(alone, together):
    """Three windows for two workers, which under ZeRO-3 have to make as many forward passes each."""
    assert together["untuned"]["perplexity"][0] == pytest.approx(alone["perplexity"][0], **LOSSES[alone["device"]])


def test_a_checkpoint_holds_the_whole_of_everything_whatever_the_engine(alone, together):
    """ZeRO-3 had saved trainable embeddings at size 0 (peft #2450)."""
    ours, theirs = tensors_of(together["folder"] / "plain", 5), tensors_of(alone["folder"], 5)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **WEIGHTS[alone["device"]], msg=name)


def test_a_checkpoint_of_any_engine_goes_on_alone_and_back(alone, together, model, corpus, tmp_path):
    shutil.copytree(together["folder"] / "plain" / "step-00000004", tmp_path / "step-00000004")
    back = train(model, corpus, tmp_path, alone["device"])
    last = {5: alone["loss"][5]}
    assert together["alone"]["loss"] == pytest.approx(last, **LOSSES[alone["device"]])
    assert back["loss"] == pytest.approx(last, **LOSSES[alone["device"]])
    # The update after it: both moments and the count of steps were taken up, or it would be another.
    for folder in (together["folder"] / "alone", tmp_path):
        for name, tensor in tensors_of(alone["folder"], 5).items():
            torch.testing.assert_close(tensors_of(folder, 5)[name], tensor, **WEIGHTS[alone["device"]], msg=name)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_on_one_worker_stops_all_in_its_step_and_nothing_is_updated(together, what):
    before = tensors_of(together["folder"] / what, 2, "model/")
    for worker in together["workers"]:
        assert worker[what]["said"].startswith("step 3: loss")
    assert worker[what]["said"] == together[what]["said"]
    for name, tensor in together[what]["weights"].items():
        assert torch.equal(tensor, before[f"model/{name}"]), name


def test_a_checkpoint_that_cannot_be_written_ends_every_worker(together):
    first, second = (worker["unwritable"] for worker in together["workers"])
    assert "step-00000002" in first and "could not be written" in first
    assert second == "worker 0 could not write the checkpoint of step 2"


def test_the_first_workers_clock_decides_for_all_when_a_checkpoint_is_due(together):
    assert [worker["clock"] for worker in together["workers"]] == [[1, 2, 3], [1, 2, 3]]


def test_zero_without_deepspeed_is_refused(monkeypatch):
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"zero3 needs DeepSpeed.*pip install 'longspan\[deepspeed\]'"):
        make_engine(ExecutionConfig(engine="zero3"), torch.device("cpu"), "float32")


def test_zero3_refuses_a_quantised_base(model, corpus, tmp_path):
    """Before anything is loaded, so also where there is no GPU."""
    shared = {"context_length": 128, "method": "lora", "attention": "full", "eval_span": 128, "quantization": "nf4"}
    config, execution = TrainingConfig(**shared, steps=1), ExecutionConfig(engine="zero3")
    engine = Engine(torch.device("cpu"), "float32")
    with pytest.raises(InputError, match="nf4 with the engine zero3"):
        run(model, config, execution, PackedCorpus.open(corpus), tmp_path, engine, lambda event, **fields: None)


def test_zero3_refuses_to_compile_layers(model, corpus, tmp_path):
    shared = {"context_length": 128, "method": "lora", "attention": "full", "eval_span": 128}
    config, execution = TrainingConfig(**shared, steps=1), ExecutionConfig(engine="zero3", compile_layers="on")
    engine = Engine(torch.device("cpu"), "float32")
    with pytest.raises(InputError, match="compile_layers is on with the engine zero3"):
        run(model, config, execution, PackedCorpus.open(corpus), tmp_path, engine, lambda event, **fields: None)


def test_only_zero_offloads():
    with pytest.raises(InputError, match="choose zero2 or zero3"):
        ExecutionConfig(engine="ddp", offload=True)

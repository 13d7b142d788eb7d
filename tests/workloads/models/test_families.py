"""Every family the whole way: loaded, its positions extended, trained, exported, and loaded by stock libraries."""

import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.records.storage import Storage
from orchestrator.trial_spec import Identities, TrialSpec
from tests.support.events import emit_to
from tests.support.models import small_model
from tests.support.texts import prepare_texts
from workloads.attention.interface import full_attention
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.export import export_trial
from workloads.models.families import FAMILIES
from workloads.models.source import ModelSource
from workloads.training.loop import Trial
from workloads.training.setup import build_model

TINY = ModelSource.parse("builtin:tiny")
ORIGINAL, CONTEXT = 32, 64
# Longer than the original context, so that wrong positions show.
TOKENS = torch.randint(0, 256, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
# Phi-3's configuration allows no other kind.
POSITIONS = {"phi3": "ntk"}
# As in its smaller models; those of Gemma are tied by default.
MORE = {"qwen3": {"tie_word_embeddings": True}}
# Its configuration has one kind of positions for layers with windows and one for those without, used or not.
REFUSED = "gemma3_text"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare_texts(tmp_path_factory.mktemp, documents=20, lines=25)


def save_base(family, folder):
    # At the usual range of 0.02 so small a model hardly attends, and positions hardly show.
    shape = dict(vocab_size=264, max_position_embeddings=ORIGINAL, initializer_range=0.1)
    small_model(family, **shape, **MORE.get(family, {})).save_pretrained(folder)
    TINY.tokenizer().save_pretrained(folder)
    return ModelSource.parse(str(folder))


def train(source, positions, corpus, root):
    """A trial's folder as a sweep writes it, and the trained model still in memory: the oracle."""
    config = TrainingConfig(
        context_length=CONTEXT, method="lora+", attention="s2", group_size=16, positions=positions, steps=2, batch=2,
        learning_rate=3e-2, warmup_steps=0, precision="float32", eval_documents=2, eval_span=CONTEXT,
    )  # fmt: skip
    identities = Identities(model=source.identity, tokenizer=source.tokenizer_identity, data="hub:org/digits@0a1b")
    spec = TrialSpec(model=source.name, data="digits", identities=identities, training=config)
    folder = Storage(root).add_trial(spec, source.location)
    engine, execution = Engine(torch.device("cpu"), "float32"), ExecutionConfig()
    model = build_model(source, config, engine, execution)
    Trial(model, config, execution, corpus, folder.checkpoints, engine, emit_to(folder.journal)).run()
    return folder.path, model


@torch.inference_mode()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def difference(found, expected):
    """As a share of the largest logit."""
    return (found - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != REFUSED])
def test_every_family_trains_and_loads_again_in_stock_transformers_and_peft(family, corpus, tmp_path):
    source = save_base(family, tmp_path / "base")
    trial, trained = train(source, POSITIONS.get(family, "linear"), corpus, tmp_path / "runs")
    with full_attention(trained):
        expected = logits(trained)

    for what in ("merged", "adapter"):
        export_trial(trial, tmp_path / what, what=what, dtype="float32")
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(source.location, config=config)
    untrained = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), adapted):
        assert difference(logits(model), expected) <= 1e-5
        assert is_tied(model) == config.tie_word_embeddings == (family in ("qwen3", "gemma", "gemma2"))

    # Training has changed the weights and positions reach further, so that both had to be saved.
    unstretched = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", config=source.config())
    assert difference(untrained, expected) > 0.1 and difference(logits(unstretched), expected) > 0.001


@pytest.mark.parametrize("positions", ["none", "linear", "ntk"])
def test_gemma_3_is_refused_at_loading_even_where_all_its_layers_attend_fully(positions, tmp_path):
    source = save_base(REFUSED, tmp_path)
    with pytest.raises(InputError, match="a gemma3_text model has different rotary positions in different layers"):
        source.load(CONTEXT, positions, torch.float32)

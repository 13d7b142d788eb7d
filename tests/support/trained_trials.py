"""Trained trials of small random models, as a sweep leaves them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from orchestrator.records.storage import Storage
from orchestrator.trial_spec import Identities, TrialSpec
from tests.support.events import emit_to
from tests.support.models import small_llama
from workloads.attention.interface import full_attention
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import PackedCorpus
from workloads.engines.engine import Engine
from workloads.models.source import ModelSource
from workloads.training.loop import Trial
from workloads.training.setup import build_model

TINY = ModelSource.parse("builtin:tiny")
CPU = torch.device("cpu")
ORIGINAL, CONTEXT = 32, 64
# Longer than the original context, so that wrong positions show.
TOKENS = torch.randint(0, 256, (1, CONTEXT), generator=torch.Generator().manual_seed(0))


def llama(**overrides):
    # At the usual range of 0.02 so small a model hardly attends, and positions hardly show.
    shape = dict(num_key_value_heads=2, max_position_embeddings=ORIGINAL, eos_token_id=256, initializer_range=0.1)
    return small_llama(**{**shape, **overrides})


@dataclass
class Trained:
    """A trial's folder as a sweep writes it, and the trained model still in memory: the oracle."""

    folder: object
    model: nn.Module
    base: ModelSource

    def logits(self):
        device = self.model.get_input_embeddings().weight.device
        with torch.inference_mode(), full_attention(self.model):
            return self.model.eval()(input_ids=TOKENS.to(device)).logits.cpu()


def train_trial(
    root: Path, corpus: PackedCorpus, method: str, tied: bool, positions: str, precision: str, bits: str
) -> Trained:
    """Trains a trial of a small random model for three steps, in a storage at ``root``."""
    base = root / "-".join(map(str, ("base", method, tied, positions, precision, bits)))
    wide = {"hidden_size": 64, "intermediate_size": 128} if bits == "nf4" else {}  # blocks of 64 numbers
    llama(tie_word_embeddings=tied, **wide).save_pretrained(base)
    TINY.tokenizer().save_pretrained(base)
    source = ModelSource.parse(str(base))
    trains = {} if method == "untuned" else {"steps": 3, "batch": 2, "learning_rate": 3e-2, "warmup_steps": 0}
    config = TrainingConfig(
        context_length=CONTEXT,
        method=method,
        attention="full" if method == "untuned" else "s2",
        group_size=None if method == "untuned" else 16,
        positions=positions,
        precision=precision,
        quantization=bits,
        eval_every=2,
        eval_documents=2,
        eval_span=CONTEXT,
        **trains,
    )
    spec = TrialSpec(
        model=str(base),
        data="digits",
        identities=Identities(
            model=source.identity, tokenizer=source.tokenizer_identity, data="hub:org/digits@0a1b:default"
        ),
        training=config,
    )
    folder = Storage(root).add_trial(spec, source.location)
    device = torch.device("cuda", 0) if bits == "nf4" and torch.cuda.is_available() else CPU
    engine, execution = Engine(device, precision), ExecutionConfig(checkpoint_every=2)
    model = build_model(source, config, engine, execution)
    Trial(model, config, execution, corpus, folder.checkpoints, engine, emit_to(folder.journal)).run()
    return Trained(folder.path, model, source)


@torch.inference_mode()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits

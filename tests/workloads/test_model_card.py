"""The model card of an export: its statements hold, and its code runs."""

import json
import shutil
import threading
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from tests.support.trained_trials import CONTEXT, ORIGINAL, TINY, llama, logits
from workloads.config import TrainingConfig
from workloads.export import export_trial
from workloads.model_card import model_card
from workloads.models.source import ModelSource
from workloads.trained import TrainedTrial


def test_the_card_says_what_it_is_and_how_to_load_it(train, tmp_path):
    trained = train("lora+", False, "linear")
    export_trial(trained.folder, tmp_path / "out", what="adapter")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.datasets == "org/digits" and card.data.base_model is None  # a folder is nothing to link to
    events = [event for event in TrainedTrial.open(trained.folder).evaluations() if event["step"] != 2]
    assert [(e["context_length"], e["step"]) for e in events] == [(ORIGINAL, 3), (CONTEXT, 0), (CONTEXT, 3)]
    for event in events:
        assert f"| {event['context_length']} | {event['step']} | {event['perplexity']:.3f} |" in card.text
    assert "| Steps | 3 |" in card.text
    assert trained.base.location not in card.text  # a path of this machine
    # What the card says to do is done here, to the letter.
    (code,) = [part.split("```")[0] for part in card.text.split("```python")[1:]]
    done = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "out")).replace("BASE_FOLDER", trained.base.location), done)
    assert logits(done["model"]).isfinite().all() and done["tokenizer"].model_max_length == CONTEXT


# Of each field a value that is not its default.
CHANGES = dict(
    context_length=128, method="lora+embed", attention="dilated", group_size=32, document_mask=True, positions="ntk",
    lora_rank=4, lora_alpha=8.0, lora_targets=("q_proj",), train_layers="last 1", quantization="nf4", steps=9, batch=4,
    learning_rate=1e-3, learning_rate_embeddings=1e-4, learning_rate_norms=1e-5, schedule="cosine", warmup_steps=1,
    beta1=0.8, beta2=0.99, weight_decay=0.1, max_grad_norm=None, precision="bfloat16", seed=3, eval_every=7,
    eval_documents=9, eval_span=256, task="sft", long_examples="truncate", original_length=16,
)  # fmt: skip


def test_the_card_tells_every_setting_that_is_not_at_its_default(train):
    trial = TrainedTrial.open(train("lora+", False, "linear").folder)
    assert CHANGES.keys() == {field.name for field in fields(TrainingConfig)}

    def card(**changes):
        changes |= {"task": "sft"} if "long_examples" in changes else {}
        changes |= {"eval_span": 128} if "context_length" in changes else {}
        return model_card(
            replace(trial, training=replace(trial.training, **changes)), TINY, llama().config, what="merged", step=3,
            rounding="saved",
        )  # fmt: skip

    assert [name for name, value in CHANGES.items() if card(**{name: value}) in (card(), card(task="sft"))] == ["task"]
    assert "NTK-aware positions" in card(positions="ntk") and "[INST]" in card(task="sft")
    assert "Needs transformers 4.57 or newer" in card()


def test_the_card_states_the_licence_that_the_base_states(train, tmp_path):
    trial = TrainedTrial.open(train("lora+", False, "linear").folder)

    def licence(base):
        card = ModelCard(model_card(trial, base, llama().config, what="merged", step=3, rounding="saved")).data
        return card.license, card.to_dict().get("license_name")

    assert licence(TINY) == ("apache-2.0", None)
    shutil.copytree(TINY.location, tmp_path / "base")
    base = ModelSource.parse(str(tmp_path / "base"))
    (tmp_path / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\n---\n")
    assert licence(base) == ("other", "theirs")
    for text in ("no front matter", "---\n: [\n---\n"):
        (tmp_path / "base" / "README.md").write_text(text)
        assert licence(base) == (None, None)
    (tmp_path / "base" / "README.md").unlink()
    assert licence(base) == (None, None)


class Hub(BaseHTTPRequestHandler):
    """A model hub of one model, as far as its card goes."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"id": "org/name", "cardData": {"license": "llama2"}}).encode())


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_the_card_of_a_hub_base_links_to_it_and_states_its_licence(train, hub):
    trained = TrainedTrial.open(train("lora", False, "linear").folder)
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = ModelSource.parse(f"org/name@{commit}")
    config = llama().config
    card = ModelCard(model_card(trained, base, config, what="adapter", step=3, rounding="saved"))
    assert (card.data.base_model, card.data.license) == ("org/name", "llama2")
    assert f'"org/name", revision="{commit}"' in card.text

"""``python -m workloads.export TRIAL DIR``: a trained trial as a model that stock transformers, or stock PEFT, loads.

A merged model is complete: weights, the configuration with its RoPE settings, the tokenizer. An adapter holds what
trained (LoRA's matrices; with LoRA+ the embeddings and norms too, as PEFT's ``modules_to_save``), with the
configuration to load the base with. An export is loaded again before it gets its final name, and its logits are
compared with the trained model's.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from workloads.adaptation.methods import compute_dtype
from workloads.command import quiet_transformers, run_command
from workloads.config import Precision
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.model_card import model_card
from workloads.models.adapters import base_of_adapter, note_base
from workloads.models.source import check_vocabulary
from workloads.stock_model import cast_parameters, make_stock, merge, save_adapter, save_merged
from workloads.terminal import printable
from workloads.trained import TrainedTrial

What = Literal["merged", "adapter"]

# Logits of the same weights, computed in float32 in another order, differ by at most this share of the largest.
FLOAT32_TOLERANCE = 1e-5

CHECK_TEXT = (
    "It was a bright cold day in April, and the clocks were striking thirteen. def area(radius): return 3.14159 * "
    "radius ** 2  # The sum of the first n odd numbers is n squared: 1 + 3 + 5 + 7 = 16."
)


class ExportMismatch(RuntimeError):
    """The export, loaded again, is not the trained model. It was removed."""


@dataclass(frozen=True)
class Report:
    """An export, and how closely it matches the trained model.

    Args:
        folder: where it is.
        what, dtype: as requested.
        step: the optimiser step of its weights.
        tokens: length of the text on which the logits were compared.
        difference: the largest absolute difference of a logit from the trained model's, both computed in float32: the
            rounding of the saved weights.
        largest_logit: the largest absolute logit of the trained model, for scale.
        same_prediction: share of the positions at which both give the same most likely next token.
        quantised_base: whether the base was quantised to 4 bits in training; it is merged, and compared, dequantised.
        float8_base: whether the base was in FP8 in training; it is merged, and compared, as before quantisation.
    """

    folder: Path
    what: What
    dtype: Precision
    step: int
    tokens: int
    difference: float
    largest_logit: float
    same_prediction: float
    quantised_base: bool
    float8_base: bool = False

    def __str__(self) -> str:
        sentence = (
            f"saved in {self.dtype}; on a text of {self.tokens} tokens, computed in float32, its logits differ from "
            f"the trained model's by at most {self.difference:.2g} (the largest logit is {self.largest_logit:.3g}), "
            f"and the most likely next token is the same at {self.same_prediction:.0%} of positions"
        )
        if self.quantised_base:
            sentence += (
                "; the base was quantised in training: it was merged and compared dequantised, with the rounding of "
                "its quantisation"
            )
        if self.float8_base:
            sentence += (
                "; the base was in FP8 in training, and the perplexities were measured with it: it was merged and "
                "compared without that rounding"
            )
        return sentence


def export_trial(
    trial: Path,
    out: Path,
    *,
    what: What = "merged",
    dtype: Precision = "bfloat16",
    base: str | None = None,
    unfinished: bool = False,
    checkpoint: str = "last",
) -> Report:
    """Exports the trained trial in the folder ``trial`` to the folder ``out``, which is whole afterwards or absent.

    Args:
        base: where the trial's base model is, if it has moved.
        unfinished: takes the newest checkpoint of a trial that has not reached its last step.
        checkpoint: ``last``, ``best`` or a step.

    Raises:
        InputError: ``trial`` is not a trial's folder or is unfinished, its base is absent or another model, its
            checkpoint is damaged or another model's, its method has no adapter, or ``out`` is not empty.
        ExportMismatch: the export does not give the trained model's logits.
        OSError: the disk is full.
    """
    trained = TrainedTrial.open(trial)
    method = trained.training.method
    if what == "adapter" and not method.startswith("lora"):
        why = "trained every weight" if method == "full" else "trained nothing"
        raise InputError(f"{trial} {why} (method {method!r}), so it has no adapter; export it with --what merged")
    _refuse_existing(out)
    source = trained.base(base)
    step = trained.step(unfinished, checkpoint)
    tokenizer = source.tokenizer()
    quantised = trained.training.quantization == "nf4"
    # A base is quantised to 4 bits on a GPU only; all else runs on the CPU, which has more memory.
    device = torch.device("cuda" if quantised and torch.cuda.is_available() else "cpu")
    model = trained.build(source, step, Engine(device, trained.training.precision))
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], source.name)
    quantization = make_stock(model)
    cast_parameters(model.to("cpu"), torch.float32)

    tokens = tokenizer(CHECK_TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    expected = _logits(model, tokens)
    if not expected.isfinite().all():
        raise InputError(f"the model of {trial} at step {step} has logits that are not finite, so it cannot be used")
    with _whole_or_absent(out) as folder:
        if what == "merged":
            model = merge(model)
            _expect_same(_logits(model, tokens), expected, "merged into the base")
            save_merged(model, tokenizer, folder, dtype)
        else:
            save_adapter(model, tokenizer, folder, dtype, base_revision=source.revision)
            note_base(folder, trained.model_identity)
        cast_parameters(model, torch.float32)
        rounded = _logits(model, tokens)
        del model
        reloaded = _reload(folder, what, compute_dtype(trained.training.precision), quantization)
        found = _logits(reloaded, tokens)
        _expect_same(found, rounded, f"loaded from {out}")
        report = Report(
            folder=out,
            what=what,
            dtype=dtype,
            step=step,
            tokens=tokens.shape[1],
            difference=(found - expected).abs().max().item(),
            largest_logit=expected.abs().max().item(),
            same_prediction=(found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            quantised_base=quantization is not None,
            float8_base=trained.training.quantization == "fp8",
        )
        card = model_card(trained, source, reloaded.config, what=what, step=step, rounding=str(report))
        (folder / "README.md").write_text(card, "utf-8")
    return report


def _reload(folder: Path, what: What, base_dtype: torch.dtype, quantization: Any | None) -> nn.Module:
    """Loads an export as its user will, by stock transformers and PEFT, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if what == "merged":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    base = base_of_adapter(folder, dtype=base_dtype, **({"quantization_config": quantization} if quantization else {}))
    make_stock(base)
    cast_parameters(base.to("cpu"), torch.float32)
    return PeftModel.from_pretrained(base, folder, torch_device="cpu")


@torch.inference_mode()
def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each position, (tokens, vocabulary)."""
    model.eval()
    return model(input_ids=tokens, use_cache=False).logits[0].float()


def _expect_same(found: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    difference = (found - expected).abs().max().item()
    limit = FLOAT32_TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference <= limit:  # NaN included
        raise ExportMismatch(
            f"{where}, the model's logits differ by {difference:.3g} from those of the same weights in training; "
            f"float32 explains {limit:.3g}"
        )


def _refuse_existing(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; give a folder that does not exist yet, or empty it")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder that does not exist yet")


@contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that is renamed to it when the block succeeds, and removed when it fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); give a folder in a place that can") from error
    try:
        partial.chmod(0o755)  # mkdtemp gives access only to the owner
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export(
    trial: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TRIAL")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
    what: What = "merged",
    dtype: Precision = "bfloat16",
    base: str | None = None,
    unfinished: bool = False,
    checkpoint: str = "last",
) -> None:
    """Exports a trained trial for stock transformers (merged) or stock PEFT (adapter), with tokenizer and model card.

    Args:
        trial: The trial's folder, runs/trials/<fingerprint>; a sweep's last lines name it.
        out: Folder to write; it must not exist yet, or be empty.
        what: merged: the whole model; adapter: what trained, for PEFT to load on the base.
        dtype: Dtype of the saved weights.
        base: Where the base model is, if it has moved since training.
        unfinished: Take the newest checkpoint of a trial that has not reached its last step.
        checkpoint: last; best (the evaluation with the lowest perplexity at the trained length); or a step.
    """
    quiet_transformers()
    report = export_trial(trial, out, what=what, dtype=dtype, base=base, unfinished=unfinished, checkpoint=checkpoint)
    print(printable(f"{report.folder}: {report.what}, step {report.step}, {report}."))


def main(arguments: list[str] | None = None, prog: str = "python -m workloads.export") -> int:
    """Runs the command; returns its exit status."""
    return run_command(export, prog, arguments)


if __name__ == "__main__":
    sys.exit(main())

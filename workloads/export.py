"""``python -m workloads.export TRIAL DIR``: a trained trial as a model that stock transformers, or stock PEFT, loads.

A merged model is complete: weights, the configuration with its RoPE settings, the tokenizer. An adapter holds what
trained (LoRA's matrices; with LoRA+ the embeddings and norms too, as PEFT's ``modules_to_save``) with the same
configuration beside it, for the base to be loaded with. What was written is loaded again before it gets its final name,
and its logits are compared with the trained model's.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import nn

from workloads.adaptation.methods import compute_dtype
from workloads.attention.interface import CONFIG_FIELD
from workloads.command import quiet_transformers, run_command
from workloads.config import Precision
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.model_card import model_card
from workloads.models.adapters import base_of_adapter, note_base
from workloads.models.positions import max_context_length
from workloads.models.source import check_vocabulary
from workloads.trained import TrainedTrial

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

What = Literal["merged", "adapter"]

# Logits of the same weights, computed in float32 in another order, differ by no more than this share of the largest.
FLOAT32_TOLERANCE = 1e-5

CHECK_TEXT = (
    "It was a bright cold day in April, and the clocks were striking thirteen. def area(radius): return 3.14159 * "
    "radius ** 2  # The sum of the first n odd numbers is n squared: 1 + 3 + 5 + 7 = 16."
)


class ExportMismatch(RuntimeError):
    """What was written, loaded again, is not the trained model; nothing is left of it."""


@dataclass(frozen=True)
class Report:
    """What was exported, and how near it is to the trained model.

    Args:
        folder: where it lies.
        what, dtype: as asked for.
        step: the optimiser step whose weights it has.
        tokens: length of the text on which the logits were compared.
        difference: the largest absolute difference of a logit from the trained model's, both computed in float32: the
            rounding of what was saved.
        largest_logit: the largest absolute logit of the trained model, for scale.
        same_prediction: share of the positions at which both give the same most likely next token.
        quantised_base: whether the base was quantised to 4 bits in training; it is merged, and compared, dequantised.
        float8_base: whether the base was in FP8 in training; it is merged, and compared, as it was before.
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
                "; the base was quantised in training: what is merged and what is compared is that base dequantised, "
                "with the rounding of its quantisation"
            )
        if self.float8_base:
            sentence += (
                "; the base was in FP8 in training, and so the perplexities were measured: what is merged and what is "
                "compared is the base without that rounding"
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

    ``base`` says where the trial's base model is, if it is no longer where it was; ``unfinished`` takes the newest
    checkpoint of a trial that has not reached its last step; ``checkpoint`` is ``last``, ``best`` or a step.

    Raises:
        InputError: ``trial`` is no trial's folder or unfinished, its base is not there or another, its checkpoint is
            damaged or another model's, its method has no adapter, or ``out`` holds something.
        ExportMismatch: what was written does not give the trained model's logits.
        OSError: the disk is full.
    """
    trained = TrainedTrial.open(trial)
    method = trained.training.method
    if what == "adapter" and not method.startswith("lora"):
        why = "trained every weight" if method == "full" else "trained nothing"
        raise InputError(f"{trial} {why} (method {method!r}), so it has no adapter; export it with --what merged")
    _refuse_what_is_there(out)
    source = trained.base(base)
    step = trained.step(unfinished, checkpoint)
    tokenizer = source.tokenizer()
    quantised = trained.training.quantization == "nf4"
    # A base is quantised to 4 bits on a GPU only; all else is done on the CPU, whose memory is the larger.
    device = torch.device("cuda" if quantised and torch.cuda.is_available() else "cpu")
    model = trained.build(source, step, Engine(device, trained.training.precision))
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], source.name)
    quantization = make_stock(model)
    cast_parameters(model.to("cpu"), torch.float32)

    tokens = tokenizer(CHECK_TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    expected = _logits(model, tokens)
    if not expected.isfinite().all():
        raise InputError(f"the model of {trial} at step {step} gives logits that are not finite; it is of no use")
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
        (folder / "README.md").write_text(card)
    return report


def save_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: Precision = "bfloat16"
) -> None:
    """Writes a model (see :func:`merge`) with its tokenizer for ``AutoModelForCausalLM.from_pretrained(out)``.

    The model is made stock (see :func:`make_stock`) and its parameters are rounded to ``dtype``.
    """
    make_stock(model)
    cast_parameters(model, compute_dtype(dtype))
    model.save_pretrained(out)
    _save_tokenizer(tokenizer, model, out)


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    dtype: Precision = "bfloat16",
    base_revision: str | None = None,
) -> None:
    """Writes everything that trains in ``model`` for ``PeftModel.from_pretrained(base, out)``, with the configuration
    that the base is to be loaded with beside it.

    LoRA's matrices go the way PEFT's own saving takes. Modules that train as a whole (LoRA+'s embeddings and norms)
    become ``modules_to_save``, by their full names: PEFT matches by suffix, and ``norm`` would match every layer norm.
    Where the output layer is tied to the embeddings, PEFT is told to tie them again (``ensure_weight_tying``) and looks
    for both names in the file.

    The model is made stock (see :func:`make_stock`), and what trains is rounded to ``dtype``.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    make_stock(model)
    cast_parameters(model, compute_dtype(dtype), only_trainable=True)
    # Without this flag PEFT asks the model hub whether the vocabulary has grown.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and "lora_" not in name
    }
    config = copy.deepcopy(model.peft_config["default"])
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.revision = base_revision
    if whole:
        prefix = "base_model.model."
        config.modules_to_save = sorted({name.removeprefix(prefix).rpartition(".")[0] for name in whole})
        config.ensure_weight_tying = _is_tied(model)
    config.save_pretrained(str(out))
    # Copies, since safetensors takes no two names for the same memory.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in (tensors | whole).items()}
    save_file(copies, out / "adapter_model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)
    _save_tokenizer(tokenizer, model, out)


def merge(model: nn.Module) -> PreTrainedModel:
    """The model without PEFT around it, LoRA's updates added to its weights in their dtype; any other model as it is.

    By hand rather than ``merge_and_unload``, which would round the sum to a quantised layer's codes again, although
    :func:`make_stock` has dequantised it.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from workloads.adaptation.lora_fusion import unfuse_lora

    if not isinstance(model, PeftModel):
        return model
    unfuse_lora(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            weight.data += module.get_delta_weight("default").to(weight.dtype)
    return model.unload()


def make_stock(model: nn.Module) -> Any | None:
    """Takes longspan's own settings out of ``model`` (in place): what is left, stock transformers understands.

    The attention is transformers' own, the key/value cache is on, a quantised base is dequantised, and the generation
    settings are ones that transformers saves. RoPE stays as it was trained. Returns the quantisation that was undone.
    """
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    quantization = None
    if getattr(base, "hf_quantizer", None) is not None:
        quantization = base.config.quantization_config
        trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
        base.dequantize()
        for name, parameter in base.named_parameters():  # what is dequantised is a new parameter
            parameter.requires_grad_(name in trainable)
    for setting in ("quantization_config", CONFIG_FIELD):
        vars(base.config).pop(setting, None)
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")  # transformers' Gemma 2 has eager alone
    base.config.use_cache = True
    generation = base.generation_config
    generation.use_cache = True
    generation.max_length = None  # made for the original context length
    try:
        generation.validate(strict=True)
    except ValueError:
        # A temperature beside greedy decoding, as Llama 2 was published with: transformers does not save that.
        generation.do_sample = True
    return quantization


def cast_parameters(model: nn.Module, dtype: torch.dtype, only_trainable: bool = False) -> None:
    """Casts parameters in place. Buffers stay: RoPE's frequencies must not be rounded. Ties stay, too."""
    for parameter in model.parameters():
        if parameter.requires_grad or not only_trainable:
            parameter.data = parameter.data.to(dtype)


def _reload(folder: Path, what: What, base_dtype: torch.dtype, quantization: Any | None) -> nn.Module:
    """What a user will load, by stock transformers and PEFT, in float32."""
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
    """(tokens, vocabulary)"""
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


def _is_tied(model: nn.Module) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module, out: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_context_length(model.config)
    tokenizer.save_pretrained(out)
    for weights in out.glob("*.safetensors"):  # written for the owner alone, whatever the umask
        weights.chmod((out / "config.json").stat().st_mode)


def _refuse_what_is_there(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; give a folder that does not exist yet, or empty it")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder that does not exist yet")


@contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when the block ends well, and is gone when it does not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); give a folder in a place that can") from error
    try:
        partial.chmod(0o755)  # a temporary folder is its owner's alone
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(
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
        what: merged: the whole model; adapter: what trained, to be put on the base by PEFT.
        dtype: Of the saved weights.
        base: Where the base model is, if it is no longer where it was in training.
        unfinished: Take the newest checkpoint of a trial that has not reached its last step.
        checkpoint: last; best (the evaluation with the lowest perplexity at the trained length); or a step.
    """
    quiet_transformers()
    report = export_trial(trial, out, what=what, dtype=dtype, base=base, unfinished=unfinished, checkpoint=checkpoint)
    print(f"{report.folder}: {report.what}, step {report.step}, {report}.")


if __name__ == "__main__":
    sys.exit(run_command(main, "workloads.export"))

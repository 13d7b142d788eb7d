"""Trains ``builtin:tiny``, the embedded base model: a small byte-level Llama of Python source with a short context.

A first sweep needs a pretrained model whose context is worth extending, and must not need a download. This one is made
from what is installed beside longspan, in two steps that may run on two machines:

    python -m workloads.builtin.pretrain_tiny prepare --data tiny.npz
    python -m workloads.builtin.pretrain_tiny train --data tiny.npz --out workloads/builtin/tiny

``prepare`` collects Python source in one file. The held-out part of ``builtin:stdlib`` is in it for scoring only:
files that share text with it are dropped from the rest. ``train`` runs on one device and leaves a folder that
stock transformers loads; the model card beside the weights holds the figures.
"""

import argparse
import hashlib
import json
import math
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workloads.data.stdlib import stdlib_documents

CONTEXT = 512
VOCABULARY = 264  # 256 bytes and the two below, rounded up to a multiple of 8
END_OF_TEXT, PAD = 256, 257

# Python sources under permissive licences, as installed beside longspan. Excluded, since they contain copies of
# standard-library modules: pip, setuptools, multiprocess, dill, importlib_metadata, typing_extensions, zipp, packaging.
PACKAGES = (
    *("torch", "transformers", "ray", "sympy", "pandas", "scipy", "mlflow", "scikit-learn", "numpy", "SQLAlchemy"),
    *("networkx", "matplotlib", "fonttools", "Pygments", "huggingface_hub", "peft", "datasets", "narwhals", "mpmath"),
    *("pydantic", "accelerate", "pytest", "rich", "docker", "aiohttp", "alembic", "fastapi", "joblib", "gunicorn"),
    *("fsspec", "GitPython", "Werkzeug", "Jinja2", "click", "anyio", "pyparsing", "urllib3", "requests", "Flask"),
    *("starlette", "uvicorn", "graphql-core", "psutil", "python-dateutil", "PyYAML", "cffi", "pycparser", "attrs"),
    *("cryptography", "jsonschema", "Mako", "markdown-it-py", "sqlparse", "prettytable", "typer", "tyro", "filelock"),
    *("google-auth", "opentelemetry-sdk", "pillow", "pyasn1", "httpx2", "h11", "typeguard", "sortedcontainers"),
)
MAX_PACKAGE_BYTES = 12_000_000  # of one package, so that no project dominates the corpus
MAX_FILE_BYTES = 400_000  # longer ones are tables
MIN_LINE = 30  # characters of a line that identifies its text; shorter ones recur everywhere
MAX_SHARED_OF_FILE = 0.05  # of a file's identifying lines, found in any held-out file
MAX_SHARED_OF_HELD_OUT = 0.20  # of one held-out file's identifying lines, found in a file
_SKIPPED_FOLDERS = frozenset({"test", "tests", "_vendor", "vendor", "thirdparty", "third_party", "thirdparty_files"})


# Preparing


def prepare(arguments: argparse.Namespace) -> None:
    """Writes the four groups of text, each a uint8 array of documents that end with NUL, and their sources."""
    held_out = [text for _, text in stdlib_documents("validation")]
    is_copy = copy_detector(held_out)
    seen: set[bytes] = set()
    sources: list[dict] = []

    def gather(name: str, version: str, licence: str, texts: Iterable[str], limit: float = math.inf) -> list[str]:
        kept, counts, size = [], Counter(files=0, copies=0, duplicates=0), 0
        for text in texts:
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen:
                counts["duplicates"] += 1
            elif is_copy(text):
                counts["copies"] += 1
            elif size < limit:
                seen.add(digest)
                kept.append(text)
                counts["files"] += 1
                size += len(text.encode())
        sources.append({"name": name, "version": version, "licence": licence, "bytes": size, **counts})
        return kept

    python = sysconfig.get_python_version()
    groups = {"held_out": held_out}
    groups["stdlib"] = gather("stdlib, train", python, "PSF-2.0", (text for _, text in stdlib_documents("train")))
    groups["stdlib_tests"] = gather("stdlib, tests", python, "PSF-2.0", stdlib_test_texts())
    groups["packages"] = []
    for name in PACKAGES:
        package = distribution(name)
        groups["packages"] += gather(
            name, package.version, licence_of(package.metadata), package_texts(name), MAX_PACKAGE_BYTES
        )
    arrays: dict[str, Any] = {
        name: np.frombuffer(b"".join(text.encode() + b"\0" for text in texts), np.uint8)
        for name, texts in groups.items()
    }
    arguments.data.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.data, sources=json.dumps(sources), **arrays)
    for source in sources:
        print(" | ".join(str(value) for value in source.values()))
    print({name: len(array) for name, array in arrays.items()}, f"{arguments.data.stat().st_size / 2**20:.1f} MiB")


def copy_detector(held_out: list[str]) -> Callable[[str], bool]:
    """Returns a function that detects copies of held-out texts, backports and other versions included."""
    owners: dict[str, set[int]] = {}
    for index, text in enumerate(held_out):
        for line in _identifying_lines(text):
            owners.setdefault(line, set()).add(index)
    num_lines = Counter(index for indices in owners.values() for index in indices)

    def is_copy(text: str) -> bool:
        lines = set(_identifying_lines(text))
        shared = [owners[line] for line in lines if line in owners]
        if len(shared) > MAX_SHARED_OF_FILE * len(lines):
            return True
        return any(
            shared_lines > MAX_SHARED_OF_HELD_OUT * num_lines[index]
            for index, shared_lines in Counter(index for indices in shared for index in indices).items()
            if num_lines[index] >= 5
        )

    return is_copy


def _identifying_lines(text: str) -> Iterator[str]:
    return (line for line in map(str.strip, text.splitlines()) if len(line) >= MIN_LINE)


def stdlib_test_texts() -> Iterator[str]:
    """The sources of the standard library's tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    for file in sorted(folder.rglob("*.py")):
        folders = set(file.relative_to(folder).parts[:-1])
        if folders & {"test", "tests", "idle_test"} and "site-packages" not in folders:
            yield from _readable_text(file)


def package_texts(name: str) -> Iterator[str]:
    """A package's sources, in the order of a hash of their paths, which mixes its folders."""
    package = distribution(name)
    files = [file for file in package.files or [] if file.suffix == ".py" and _SKIPPED_FOLDERS.isdisjoint(file.parts)]
    for file in sorted(files, key=lambda file: hashlib.sha256(file.as_posix().encode()).digest()):
        yield from _readable_text(Path(str(package.locate_file(file))))


def _readable_text(file: Path) -> Iterator[str]:
    """The file's text; nothing if it does not decode, is empty, contains NUL, or is a table."""
    if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
        return
    try:
        with tokenize.open(file) as source:
            text = source.read()
        text.encode()
    except (SyntaxError, UnicodeError):
        return
    if text.strip() and "\0" not in text and max(map(len, text.splitlines())) < 1000:
        yield text


def licence_of(metadata: Any) -> str:
    """A package's licence, from any of the three fields of its metadata that may state it."""
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    stated = metadata.get("License-Expression") or "; ".join(classifiers) or metadata.get("License") or "not stated"
    return stated.splitlines()[0]


# Training


def train(arguments: argparse.Namespace) -> None:
    """Trains on the prepared file, saves the model, and prints its held-out perplexities."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    data = np.load(arguments.data)
    groups = {name: torch.from_numpy(data[name]).to(device) for name in ("stdlib", "stdlib_tests", "packages")}
    held_out = _documents_of(data["held_out"])
    seen_sample = _documents_of(data["stdlib"][:800_000])  # about the size of the held-out text: shows overfitting
    sampler = Sampler(groups, arguments.shares, arguments.batch, arguments.seed)

    model = LlamaForCausalLM(_config_of(arguments)).to(device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = {name: value for name, value in vars(arguments).items() if name != "run"}
    print(f"{num_parameters:,} parameters on {device}; {settings}", flush=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": arguments.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    compiled_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of
    compiled_loss(sampler.rows()).backward()  # compiles before the clock starts
    optimizer.zero_grad()

    def report(progress: float, step: int, loss: float) -> None:
        model.eval()
        with torch.autocast(device.type, torch.bfloat16):
            figures = {
                "held-out 512": perplexity(model, held_out, CONTEXT),
                "seen 512": perplexity(model, seen_sample, CONTEXT),
            }
        model.train()
        tokens = step * arguments.batch * CONTEXT
        line = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        seconds = time.monotonic() - start
        print(
            f"{progress:4.0%} step {step} {tokens / 1e6:.0f}M tokens {seconds:.0f} s loss {loss:.3f}; {line}",
            flush=True,
        )

    start = time.monotonic()
    step, progress, next_report = 0, 0.0, 0.1
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * learning_rate_factor(step, progress)
        loss = compiled_loss(sampler.rows())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if device.type == "cuda" and step % 20 == 0:
            torch.cuda.synchronize()  # the clock below counts finished steps
        progress = max(step / arguments.steps, (time.monotonic() - start) / arguments.seconds)
        if progress >= next_report:
            next_report += 0.1
            report(progress, step, loss.item())
    seconds = time.monotonic() - start
    tokens = step * arguments.batch * CONTEXT
    print(f"{step} steps, {tokens:,} tokens, {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s")

    save_folder(model, arguments.out)
    for name, value in score(arguments.out, held_out, device).items():
        print(f"{arguments.out.name} held out, {name}: perplexity {value:.3f}")


def learning_rate_factor(step: int, progress: float, warmup_steps: int = 200, floor: float = 0.01) -> float:
    """Linear warm-up, then cosine over the run's progress (0 to 1) down to ``floor``."""
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / warmup_steps) * cosine


class Sampler:
    """Draws rows of ``CONTEXT`` + 1 tokens at random places of a group, and groups by their shares of the tokens."""

    def __init__(self, groups: dict[str, torch.Tensor], shares: list[float], batch: int, seed: int):
        self.text = torch.cat(list(groups.values()))
        sizes = torch.tensor([len(text) for text in groups.values()])
        self.first = (sizes.cumsum(0) - sizes).to(self.text.device)
        self.last = (self.first + sizes.to(self.text.device)) - CONTEXT - 1
        self.shares = torch.tensor(shares, device=self.text.device)
        self.batch = batch
        self.generator = torch.Generator(self.text.device).manual_seed(seed)
        self.window = torch.arange(CONTEXT + 1, device=self.text.device)

    def rows(self) -> torch.Tensor:
        """(batch, CONTEXT + 1) token ids."""
        group = torch.multinomial(self.shares, self.batch, replacement=True, generator=self.generator)
        place = torch.rand(self.batch, generator=self.generator, device=self.text.device, dtype=torch.float64)
        starts = self.first[group] + (place * (self.last - self.first)[group]).long()
        return _tokens_of(self.text[starts[:, None] + self.window])


def _tokens_of(text: torch.Tensor) -> torch.Tensor:
    """Token ids of prepared text: a byte is its own id; the NUL after a document is the end-of-text token."""
    tokens = text.long()
    return tokens.masked_fill(tokens == 0, END_OF_TEXT)


def _documents_of(text: np.ndarray) -> list[torch.Tensor]:
    return [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in text.tobytes().split(b"\0") if d]


# Scoring


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, documents: list[torch.Tensor], window: int) -> float:
    """Exp of the mean negative log-likelihood over the tokens of all full windows, each predicted from its own window.

    Windows of ``window`` tokens neither overlap nor cross documents; full attention; every token but a window's first
    is scored. The rest of a document after its last full window is not.
    """
    windows = torch.cat([document[: len(document) // window * window].view(-1, window) for document in documents])
    total = 0.0
    for rows in windows.split(max(1, 65_536 // window)):
        rows = _tokens_of(rows.to(model.device))
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (window - 1)))


def score(folder: Path, held_out: list[torch.Tensor], device: torch.device) -> dict[str, float]:
    """Perplexities of the saved model in float32; beyond its context also with linear position interpolation."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    figures = {f"window {window}": perplexity(model, held_out, window) for window in (256, CONTEXT, 1024, 2048)}
    for factor in (2, 4):
        config = LlamaConfig.from_pretrained(folder)
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": float(factor)}
        model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).to(device).eval()
        figures[f"window {factor * CONTEXT}, interpolated"] = perplexity(model, held_out, factor * CONTEXT)
    return figures


# The folder


def _config_of(arguments: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
        pad_token_id=PAD,
    )


def save_folder(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load, with weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(
        0o644
    )  # saved as readable by its owner only, which an installed package must not be
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each UTF-8 byte, its id the byte's value: a byte-level BPE without merges."""
    # Byte-level BPE writes a printable Latin-1 byte as itself, and the others as the characters from 256 on, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={symbols[byte]: byte for byte in range(256)}, merges=[]))
    # No regular expression: without merges there is no need to split words, and it doubles the time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **specials)


def main() -> None:
    """Runs ``prepare`` or ``train``, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    preparing = steps.add_parser("prepare", help="collect the text in one .npz file")
    preparing.set_defaults(run=prepare)
    training = steps.add_parser(
        "train", help="train, save and score", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    training.set_defaults(run=train)
    for step in (preparing, training):
        step.add_argument("--data", type=Path, required=True, help="the prepared file")
    training.add_argument("--out", type=Path, required=True, help="folder to save the model in")
    training.add_argument("--hidden", type=int, default=256)
    training.add_argument("--intermediate", type=int, default=704)
    training.add_argument("--layers", type=int, default=4)
    training.add_argument("--heads", type=int, default=4)
    training.add_argument("--kv-heads", type=int, default=2)
    training.add_argument("--batch", type=int, default=256, help=f"sequences of {CONTEXT} tokens in a step")
    training.add_argument("--steps", type=int, default=8_000)
    training.add_argument("--seconds", type=float, default=math.inf, help="time limit; the schedule ends with it")
    training.add_argument("--lr", type=float, default=5e-3)
    training.add_argument("--weight-decay", type=float, default=0.1)
    training.add_argument(
        "--shares",
        type=float,
        nargs=3,
        default=[0.25, 0.1, 0.65],
        help="of the tokens: standard library, its tests, packages",
    )
    training.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

"""Corpora to packed token sequences, and instruction data to examples with their answers marked.

Data is given by name, tokenised once, and then read by memory map.
"""

from workloads.data.batch import Batch
from workloads.data.corpus import Corpus
from workloads.data.examples import ExampleCorpus, ValidationExample, prepare_examples
from workloads.data.instructions import Instructions
from workloads.data.packed import PackedCorpus, ValidationDocument
from workloads.data.packing import prepare

__all__ = [
    "Batch",
    "Corpus",
    "ExampleCorpus",
    "Instructions",
    "PackedCorpus",
    "ValidationDocument",
    "ValidationExample",
    "prepare",
    "prepare_examples",
]

"""Corpora to packed token sequences: a text names a corpus, which is tokenised once and then read by memory map."""

from workloads.data.corpus import Corpus
from workloads.data.packed import PackedCorpus, ValidationDocument
from workloads.data.packing import prepare

__all__ = ["Corpus", "PackedCorpus", "ValidationDocument", "prepare"]

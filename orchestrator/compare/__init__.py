"""From the trials' journals to an answer: which setting wins, by how much, how certain that is, and at what cost.

``compare`` gives plain data, ready for JSON, whose fields ``dashboards.comparison`` documents; ``python -m
orchestrator.compare RUN RUN`` compares single runs (``__main__``).
"""

from orchestrator.compare.answer import Outcome, compare
from orchestrator.compare.words import method_labels, summarise

__all__ = ["Outcome", "compare", "method_labels", "summarise"]

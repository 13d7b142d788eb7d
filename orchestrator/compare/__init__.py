"""From the trials' journals to an answer: which setting wins, by how much, how certain that is, and at what cost.

``compare`` gives plain data, ready for JSON, whose fields ``dashboards.comparison`` documents; ``python -m
orchestrator.compare RUN RUN`` compares single runs (``__main__``).
"""

from orchestrator.compare.answer import compare
from orchestrator.compare.outcomes import Outcome
from orchestrator.compare.words import cautions, headline, labels, summarise

__all__ = ["Outcome", "cautions", "compare", "headline", "labels", "summarise"]

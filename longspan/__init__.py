"""longspan: how to give a pretrained language model a longer context, as one command and one library.

    import longspan
    sweep = longspan.sweep("convergence", context_lengths=[512], positions=["linear", "yarn"])
    sweep.results, sweep.curves, sweep.compare()
    sweep.best().export("my-model")

See docs/python.md. The packages that it joins stay top-level modules: orchestrator, workloads, clusters, dashboards.
"""

from longspan.library import open_sweep as open
from longspan.library import plan, sweep
from longspan.results import Sweep, Trial

__all__ = ["Sweep", "Trial", "open", "plan", "sweep"]

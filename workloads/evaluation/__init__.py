"""How good a model is at a length, always with full attention, and how sure that is.

``perplexity``   held-out documents in windows, scored by two rules
``passkey``      a number hidden in filler text, by length and depth
``topics``       LongChat's topic and line retrieval: its own cases, or generated ones of the same form
``retrieval``    what the last two share: prompts of an exact length, greedy answers, when an answer counts
``documents``    which documents are scored
``run``          the tasks, from options to files; ``options``, ``tables``
``cost``         what an evaluation takes, before it is run
``bootstrap``    intervals (NumPy only)
``pictures``     the results as PNG files

``python -m workloads.evaluate`` is the command line to it.
"""

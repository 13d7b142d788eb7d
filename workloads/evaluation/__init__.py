"""How good a model is at a length, always with full attention, with confidence intervals.

``perplexity``   held-out documents in windows, scored by two rules
``passkey``      a number hidden in filler text, by length and depth
``topics``       LongChat's topic and line retrieval: its own cases, or generated ones of the same form
``retrieval``    common to the last two: prompts of an exact length, greedy answers, which are correct
``documents``    which documents are scored
``run``          from ``options`` to files: ``subject`` loads the model, ``tasks`` evaluate it, ``tables`` print results
``cost``         the cost of an evaluation before it runs
``bootstrap``    intervals (NumPy only)
``pictures``     the results as PNG files

``python -m workloads.evaluate`` is its command line.
"""

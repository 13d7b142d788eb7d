"""How good a model is at a length, always with full attention, with confidence intervals.

``tasks``      the evaluations that ``python -m workloads.evaluate`` offers, one file each, and their registry
``task``       what such an evaluation is: its options, how it runs, its table and its picture
``options``    the options that all share
``run``        from options to files: ``subject`` loads the model
``windows``    windows of held-out documents, scored by two rules; ``documents`` chooses the documents
``retrieval``  common to passkey and topics: prompts of an exact length, which answers are correct; ``greedy`` answers
``answers``    perplexity over the answers of instruction data
``time_estimate``  the cost of an evaluation before it runs
``intervals``  over documents and seeds: bootstrap, and Student's t where there are few
``pictures``   what the pictures share
"""

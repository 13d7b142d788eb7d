"""Speed and memory, side by side with what users would pick instead."""

import workloads  # noqa: F401  # first of all, for its allocator: each benchmark, and each process that it starts

"""Speed and memory, compared with the alternatives that users have."""

import workloads  # noqa: F401  # first: it sets the allocator of every benchmark and of the processes it starts

"""From what a user asks for to a plan: what runs, what is known, whether it fits, how long it takes, what it costs."""

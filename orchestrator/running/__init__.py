"""How planned trials run: the sweep with Ray Tune, each trial with Ray Train, and what follows a fault."""

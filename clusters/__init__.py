"""Where longspan runs: cluster files, and the check they have to pass before they cost money."""

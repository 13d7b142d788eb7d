"""What sweeps and trials leave behind: the storage root, journals, leases, provenance, and their mirror in MLflow."""

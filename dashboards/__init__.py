"""What people look at: the report of a sweep (data in, HTML and PNG out) and MLflow's UI."""

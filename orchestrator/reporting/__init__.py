"""What people read of a sweep: live, from another terminal, and at its end."""

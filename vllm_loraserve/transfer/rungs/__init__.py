"""The ways between two instances. Each rung is one class with `probe` (why not, or nothing) and `read`."""

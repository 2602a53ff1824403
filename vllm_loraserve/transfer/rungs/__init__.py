"""The ways between two instances. Each rung is one class with `probe` (why not, or nothing) and `read`."""

DEFAULT_ORDER = ("cuda_ipc", "memfd", "verbs_gpudirect", "verbs", "tcp")
"""Best first. On one host a copy between mappings beats a loop through the network card."""
WAYS = (*DEFAULT_ORDER, "nixl")
"""All that there are; NIXL comes only when named."""

"""Starts a whole cluster on one machine: `up`, `demo`, `status`."""

"""Discrete-event cluster that runs the very same cluster/ code."""

"""The OpenAI-compatible front door of a cluster."""

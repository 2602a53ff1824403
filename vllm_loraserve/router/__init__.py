"""The OpenAI-compatible front door of a cluster: one URL before any number of instances, any number of routers."""

"""Rank-aware LoRA shrink/expand for CPU and GPU, and the Punica wrapper that calls them."""

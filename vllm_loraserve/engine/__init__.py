"""Inside one vLLM instance: flags, LoRA manager, scheduler, resolver, agent, metrics."""

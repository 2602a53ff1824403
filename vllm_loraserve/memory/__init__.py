"""Device arena, host tier, page allocator and eviction; the Python face of csrc/."""

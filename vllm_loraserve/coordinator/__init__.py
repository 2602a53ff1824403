"""msgspec messages over ZMQ: membership, adapter registry, placement loop, routing table."""

"""Pure decisions, no I/O and no clock: demand, operating points, placement, routing, baselines."""

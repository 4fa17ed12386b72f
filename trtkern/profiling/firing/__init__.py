"""Which neurons fire, how often, and why a network does not learn."""

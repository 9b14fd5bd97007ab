"""Makes groups: an engine that never waits, reward workers beside it, weights in flight."""

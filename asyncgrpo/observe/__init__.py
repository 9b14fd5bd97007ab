"""Shows a run: metrics, trajectories, progress."""

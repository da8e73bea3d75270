"""Where a run's numbers go beside its own folder: experiment trackers, and Prometheus."""

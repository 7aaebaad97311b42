"""Several convolutions of a bottleneck as one kernel."""

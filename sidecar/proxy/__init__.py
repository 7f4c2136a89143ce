"""The inspector's I/O: listeners, drivers, workers. `session` decides; this package only carries out."""

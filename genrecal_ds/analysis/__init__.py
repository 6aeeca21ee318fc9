"""Shows what a run did, from folders and logs alone: probes, figures, calibration, report."""

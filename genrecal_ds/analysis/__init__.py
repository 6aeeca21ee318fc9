"""What a run shows: probes of the Recalibrator, and the report. Reads folders and logs only."""

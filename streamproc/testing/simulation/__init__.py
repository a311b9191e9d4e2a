"""A broker, workers, sinks and time of one application, simulated in one process; `simulate` and `Driver` are for users."""

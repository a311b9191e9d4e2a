"""Records per CPU-second of one worker, on real logs and with results that an outside computation confirms."""

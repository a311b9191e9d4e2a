"""What runs in a peer's own process. Imports nothing of streamproc: it is not installed there."""

"""The programs that streamproc runs: one file a job, each started with ``faust -A agents.NAME worker``."""

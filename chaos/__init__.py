"""Exactly-once under real kills: ``make chaos`` (see `chaos.__main__`)."""

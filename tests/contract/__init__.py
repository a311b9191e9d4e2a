"""Suites that every implementation of a contract passes; a binding gives each its fixture."""

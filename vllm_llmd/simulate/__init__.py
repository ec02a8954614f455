"""Offline simulation: the real router decides on a trace of requests, models of engines serve it, in virtual time."""

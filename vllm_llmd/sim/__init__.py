"""Engines without a model or a GPU. `scheduler` and what it imports are the model of one, pure and in virtual time.

The rest gives it an engine's outside, on a real clock.
"""

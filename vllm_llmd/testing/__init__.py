"""Shipped fakes: what our own tests use, and what a user of this package may test against."""

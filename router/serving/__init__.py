"""A client's request on its way: front door, dispatch, answer; and what an operator asks."""

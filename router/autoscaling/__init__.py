"""How many engines the traffic takes."""

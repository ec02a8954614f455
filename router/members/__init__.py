"""Which engines there are, in what state, how busy and how fast. Pure."""

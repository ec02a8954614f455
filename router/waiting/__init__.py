"""When a request may be placed, who goes first, who is shed, and who gives way; how much may wait."""

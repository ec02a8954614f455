"""Which engines may take a request, what every way to serve it costs, and which is the cheapest. Pure."""

"""What was decided, and why: explained when a client asks, recorded to a file, replayed to other policies."""

"""What is in the engines' caches, or soon will be, and where a prompt is found among it."""

"""What an engine is asked, and what it answers: one attempt over HTTP, and the stream that comes back."""

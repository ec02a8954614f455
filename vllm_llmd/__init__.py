"""llm-d's power as a vLLM plugin and a light router: see README.md."""

__version__ = "0.1.0"

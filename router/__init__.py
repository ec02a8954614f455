"""The router process: OpenAI front door, membership, prefix index, picker."""

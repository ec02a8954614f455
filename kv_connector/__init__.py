"""The vLLM plugin: the KV connector of one engine and its link to routers."""

"""Which cache layouts vLLM's attention takes. Loaded by the plugin in every process, so it imports next to nothing."""


def accept_block_outermost_layout() -> None:
    """Let vLLM's CPU attention take caches that keep all layers of a block side by side, if they are asked for.

    Its kernels go by the tensor's strides and read the same bytes per block; they only do not say that they can.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
        from vllm.v1.kv_cache_interface import KVCacheLayout

        theirs = CPUAttentionBackend.supported_kv_cache_layouts()
    except (ImportError, AttributeError):
        return
    if theirs == (KVCacheLayout.LBHNC,):
        ours = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
        CPUAttentionBackend.supported_kv_cache_layouts = classmethod(lambda cls: ours)

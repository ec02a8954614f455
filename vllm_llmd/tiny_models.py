"""Tiny random models, one per kind of KV cache: they load in seconds and make no sense.

Their wide initial weights make greedy answers vary with the prompt, so that a wrong block shows.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

SEED = 7
VOCABULARY = 512
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_tiny(directory: Path, kind: str, transformers: Any) -> None:
    """Puts model and tokenizer into `directory`."""
    torch: Any = import_module("torch")
    torch.manual_seed(SEED)
    model = {"tiny": _llama, "tiny-gemma3": _gemma3, "tiny-deepseek": _deepseek}[kind](transformers)
    model.float().save_pretrained(directory)
    _tokenizer(transformers).save_pretrained(directory)


def _llama(transformers: Any) -> Any:
    """Full attention in every layer."""
    config = transformers.LlamaConfig(**COMMON, num_key_value_heads=2, head_dim=32)
    return transformers.LlamaForCausalLM(config)


def _gemma3(transformers: Any) -> Any:
    """Sliding windows of 96 tokens beside full attention: two KV cache groups."""
    config = transformers.Gemma3TextConfig(
        **COMMON,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=96,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return transformers.Gemma3ForCausalLM(config)


def _deepseek(transformers: Any) -> Any:
    """Multi-head latent attention: one latent vector per token, held by every tensor-parallel rank."""
    config = transformers.DeepseekV2Config(
        **COMMON,
        num_key_value_heads=4,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        first_k_dense_replace=4,
    )
    return transformers.DeepseekV2ForCausalLM(config)


def _tokenizer(transformers: Any) -> Any:
    """One token per byte of UTF-8, from id 3 on; ids that no byte has decode to a word of their own."""
    tokenizers: Any = import_module("tokenizers")
    tokens = [*SPECIAL_TOKENS, *_byte_letters()]
    tokens += [f"[{number}]" for number in range(len(tokens), VOCABULARY)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    unknown, begin, end = SPECIAL_TOKENS
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _byte_letters() -> list[str]:
    """The printable letter by which byte-level BPE writes each of the 256 bytes, as GPT-2 set it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + unprintable.index(byte)) for byte in range(256)]

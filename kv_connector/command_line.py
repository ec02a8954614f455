"""What the API server's own command line says, which vLLM does not hand on to the engine core. Changes nothing."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ASKED_FOR = ("host", "port", "ssl-keyfile", "lora-modules")

Options = Mapping[str, Sequence[str]]
"""The values of each flag that was given and is asked for, at least one."""


def server_options(argv: Sequence[str] | None = None) -> Options:
    """Flags of the command line, by default this process's, over those of the file that `--config` names."""
    words = list(sys.argv if argv is None else argv)
    given = _flags(words)
    options = _from_file(given["config"][-1]) if "config" in given else {}
    return {name: values for name, values in {**options, **given}.items() if name in ASKED_FOR}


def adapter_names(options: Options) -> list[str]:
    """The adapters of `--lora-modules`, each given as NAME=PATH or as JSON. vLLM has refused anything else."""
    return [name for word in options.get("lora-modules", ()) if (name := _adapter_name(word))]


def _adapter_name(word: str) -> str | None:
    if "=" in word and "," not in word:
        return word.partition("=")[0]
    try:
        module = json.loads(word)
    except ValueError:
        return None
    name = module.get("name") if isinstance(module, dict) else None
    return name if isinstance(name, str) else None


def _flags(words: Sequence[str]) -> dict[str, list[str]]:
    """The words after each flag. A flag that is given twice counts as given last; vLLM takes underscores for dashes."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, rest = word[2:].partition("=")
            values = found[flag.replace("_", "-")] = [rest] if equals else []
        else:
            values.append(word)
    return {flag: values for flag, values in found.items() if values}


def _from_file(path: str) -> dict[str, list[str]]:
    import yaml

    loaded = yaml.safe_load(Path(path).read_text()) or {}
    return {str(key).replace("_", "-"): _words(value) for key, value in loaded.items()}


def _words(value: object) -> list[str]:
    if isinstance(value, list):
        return [word for each in value for word in _words(each)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]

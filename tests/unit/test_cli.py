"""The command line: what it refuses, how it says so, and with which exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

import vllm_llmd
from vllm_llmd import cli, launch, model
from vllm_llmd.errors import ConfigError, LaunchError
from vllm_llmd.launch_spec import FleetSpec


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vllm-llmd", *arguments])
    return cli.main()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def spec_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> FleetSpec:
    seen: list[FleetSpec] = []
    monkeypatch.setattr(launch, "run", lambda spec, _: seen.append(spec) or 0)
    assert run(monkeypatch, "up", *arguments) == 0
    return seen[0]


def test_it_tells_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vllm_llmd.cli", "--version"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout == f"vllm-llmd {vllm_llmd.__version__}\n"


def test_it_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_llmd.cli; sys.exit(bool({'torch', 'vllm', 'nixl', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=300, check=False).returncode == 0


def test_up_turns_counts_into_engines_and_passes_what_follows_two_dashes(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    flags = ("--model", str(model_dir), "--prefill", "1", "--decode", "2", "--router-port", "9", "--log-dir", "logs")
    spec = spec_of(monkeypatch, *flags, "--", "--dtype", "float32", "--", "x")
    assert [engine.id for engine in spec.engines] == ["prefill-0", "decode-0", "decode-1"]
    assert spec.router_flags == ("--port", "9")
    assert spec.engine_flags == ("--dtype", "float32", "--", "x")
    assert spec.log_dir == Path("logs")


def test_engines_have_both_roles_and_the_router_a_free_port_by_default(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    spec = spec_of(monkeypatch, "--model", str(model_dir), "--engines", "2")
    assert [(engine.id, engine.role) for engine in spec.engines] == [("engine-0", "both"), ("engine-1", "both")]
    assert spec.router_flags == ()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "--model", "/nonexistent", "--engines", "1"), "config.json"),
        (("up", "--model", ".", "--prefill", "1"), "nobody would answer"),
        (("up", "--model", ".", "--engines", "-1"), "must not be negative"),
        (("model", "m", "--", "--dtype", "x"), "only `up` passes flags"),
        (("router", "--port", "99999"), "port must be between"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("error", "status"), [(LaunchError("broken; see x.log"), 1), (ConfigError("wrong"), 2)])
def test_an_error_of_ours_is_one_line_and_tells_config_from_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(model, "run", fail)
    assert run(monkeypatch, "model", "m") == status
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("command", ["up", "model", "router"])
def test_every_command_explains_its_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, command, "--help")
    assert ended.value.code == 0
    assert "default" in capsys.readouterr().out

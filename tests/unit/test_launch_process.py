"""What is read out of logs, and ports that stay ours."""

import socket

import pytest

from vllm_llmd.launch_process import bare, meaningful, reserve_port


def test_a_line_is_stripped_of_who_wrote_it_when_and_how_loudly() -> None:
    line = "(EngineCore pid=12) ERROR 01-02 03:04:05.678 [core.py:900] ValueError: too small"
    assert bare(line) == "ValueError: too small"
    assert bare("  plain words ") == "plain words"


def test_named_errors_are_what_a_log_says_once_each() -> None:
    log = """
(EngineCore pid=12) ERROR 01-02 03:04:05 [core.py:900] Traceback (most recent call last):
(EngineCore pid=12) ERROR 01-02 03:04:05 [core.py:900]   File "core.py", line 1, in run
(EngineCore pid=12) ERROR 01-02 03:04:05 [core.py:900] vllm_llmd.errors.ConfigError: unknown key 'rooter'
(EngineCore pid=12) vllm_llmd.errors.ConfigError: unknown key 'rooter'
(APIServer pid=11) RuntimeError: Engine core initialization failed.
(APIServer pid=11) INFO 01-02 03:04:06 [x.py:1] Errors come and go.
"""
    assert meaningful(log) == [
        "vllm_llmd.errors.ConfigError: unknown key 'rooter'",
        "RuntimeError: Engine core initialization failed.",
    ]


def test_an_argument_error_is_a_named_error() -> None:
    assert meaningful("usage: x\nx.py: error: unrecognized arguments: --y\n") == [
        "x.py: error: unrecognized arguments: --y"
    ]


def test_without_a_named_error_the_last_lines_are_shown() -> None:
    assert meaningful("\n".join(f"line {n}\n" for n in range(9))) == [f"line {n}" for n in range(4, 9)]
    assert meaningful("") == []


def test_a_reserved_port_is_free_to_its_server_alone() -> None:
    with reserve_port() as held, socket.socket() as server, socket.socket() as stranger:
        with pytest.raises(OSError, match="in use"):
            stranger.bind(held.getsockname())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(held.getsockname())
        server.listen()

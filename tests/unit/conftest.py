"""Fixtures of more than one file."""

import logging

import pytest


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What our loggers say: vLLM keeps it from the root logger, where it would be heard."""
    monkeypatch.setattr(logging.getLogger("vllm_llmd"), "propagate", True)
    return caplog

"""The environment of every process that the benchmark starts."""

import os
from collections.abc import Mapping
from pathlib import Path

from pd_values import Transport

UCX_TLS: Mapping[Transport, str | None] = {"shm": None, "tcp": "tcp"}
"""Left to itself, UCX takes shared memory between processes of one machine."""


def for_transport(environ: Mapping[str, str], transport: Transport) -> dict[str, str]:
    """`environ` with this transport, without GPUs, so that every arm computes where ours does, and with a path on
    which the modules of this folder are found, but not the checkout's top: transformers would take `kernels/` for
    a package of its own."""
    paths = [str(Path(__file__).resolve().parent), *filter(None, [environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    chosen = {**environ, **own}
    chosen.pop("UCX_TLS", None)
    tls = UCX_TLS[transport]
    return chosen if tls is None else {**chosen, "UCX_TLS": tls}

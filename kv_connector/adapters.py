"""Tells adapters of one name apart: KV computed with other weights must never be taken for the right one."""

import hashlib
import logging
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

SAMPLES = 64
SAMPLE_BYTES = 4096


def digest(path: str) -> str:
    """A digest of the adapter in directory `path`: its configuration, and 64 samples from all over each weights file.

    The samples find any other training run at a cost of well under a millisecond, on the engine's own thread. An
    adapter that cannot be read has a digest of its own, which equals none.
    """
    files = sorted(file for file in Path(path).glob("adapter_*") if file.is_file())
    return _digest(path, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=256)
def _digest(path: str, files: tuple[tuple[str, int, int], ...]) -> str:
    if not files:
        logger.warning("llmd adapter %s has no adapter_* file: requests with it are prefilled here", path)
        return ""
    hashed = hashlib.blake2b(digest_size=16)
    for name, size, _ in files:
        hashed.update(f"{name}:{size}:".encode())
        with (Path(path) / name).open("rb") as content:
            for sample in range(SAMPLES):
                content.seek(size * sample // SAMPLES)
                hashed.update(content.read(SAMPLE_BYTES))
    return hashed.hexdigest()

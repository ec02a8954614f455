"""Engines without a model, in a process of their own: real links to a router, with block names for contents.

Run as a script, it holds some engines of so many blocks each and stays until its input ends.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from index_fleet import info

from vllm_llmd.kernels.prefix_table import Contents
from vllm_llmd.kv_connector.link import EngineLink, LinkSettings
from vllm_llmd.names import EngineId
from vllm_llmd.wire import Load

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Holding:
    """So many engines of so many blocks each, and the router they link to."""

    engines: int
    blocks: int
    router: str


@contextmanager
def engines_apart(holding: Holding) -> Iterator[dict[EngineId, Contents]]:
    """The engines in a fresh process, for as long as the context lasts: what each of them holds."""
    argv = [sys.executable, __file__, str(holding.engines), str(holding.blocks), holding.router]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            held = json.loads(process.stdout.readline())
            yield {EngineId(engine): Contents(*contents) for engine, contents in held.items()}
        finally:
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", type=int)
    parser.add_argument("blocks", type=int)
    parser.add_argument("router")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    links, held = [], {}
    for engine in range(args.engines):
        about = info(engine, BLOCK_SIZE, args.blocks)
        names = np.unique(rng.integers(1, 2**64, args.blocks, np.uint64))
        held[about.id] = len(names), int(np.bitwise_xor.reduce(names))
        link = EngineLink(LinkSettings(about, (args.router,), Load))
        link.publish(False, (), names.tolist())
        link.start()
        links.append(link)
    while any(link._mirror.seq == 0 for link in links):
        time.sleep(0.05)
    sys.stdout.write(json.dumps(held) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    for link in links:
        link.close()


if __name__ == "__main__":
    main()

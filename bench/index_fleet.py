"""A router's fleet filled by the messages that engines send, without sockets."""

from vllm_llmd import wire
from vllm_llmd.clock import MonotonicClock
from vllm_llmd.kernels import hash_chain_cpu, prefix_table_cpu
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.settings import RouterSettings

MODEL = "m"
EPOCH = Epoch(1)
MAX_MODEL_LEN = 131_072


def info(engine: int, block_size: int, blocks: int) -> wire.EngineInfo:
    http = f"http://127.0.0.1:{engine + 1}"
    return wire.EngineInfo(
        EngineId(f"engine-{engine}"), EPOCH, "both", http, [MODEL], block_size, blocks, MAX_MODEL_LEN, "same", []
    )


class FilledFleet:
    """A fleet of engines, numbered from 0, all ready and empty at first."""

    def __init__(self, engines: int, block_size: int, blocks: int) -> None:
        hash_chain_cpu.compile_ahead()
        prefix_table_cpu.compile_ahead()
        self.fleet = Fleet(RouterSettings(), MonotonicClock(), "bench")
        self._engines = [info(engine, block_size, blocks) for engine in range(engines)]
        self._seqs = [0] * engines
        for number, engine in enumerate(self._engines):
            self._tell(number, wire.Hello(engine))
            self._tell(number, wire.Snapshot(engine.id, EPOCH, 0, 0, 1, b""))

    def store(self, engine: int, names: Names) -> None:
        """The engine has stored these blocks."""
        self._seqs[engine] += 1
        packed = names.astype("<u8").tobytes()
        self._tell(engine, wire.BlocksChanged(self._engines[engine].id, EPOCH, self._seqs[engine], False, b"", packed))

    def _tell(self, engine: int, message: wire.LinkMessage) -> None:
        self.fleet.on_message(str(engine).encode(), message)

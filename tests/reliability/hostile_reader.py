"""Opens stores that may do harm, in a process of its own, and tells how each ended.

``python -m tests.reliability.hostile_reader`` reads the root of a store from each line of its input and
answers with a line of JSON. Private memory is limited; a process that is killed is an answer too.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.store_reader import LogitStore
from schemas.errors import TmkdError

# Of private memory, on top of what the process has once everything is imported. Allocators reserve a
# gibibyte at once; what is really used is measured.
LIMIT_BYTES = 4 << 30


@dataclass(frozen=True)
class Ending:
    """How the reading of a store ended.

    Attributes:
        error: Class of the error, empty where the store was read.
        exit_code: Of the command line, for the project's own errors; None for all others.
        message: Of the error.
        values: Logits of all rows.
        seconds: Processor time.
        grown_mb: By how much the process's resident memory grew at the most.
    """

    error: str
    exit_code: int | None
    message: str
    values: list[list[float]]
    seconds: float
    grown_mb: float


def read_store(root: str) -> Ending:
    """Opens a store and reads every row, as training does; and by shards, as scoring does."""
    before_mb = _reset_peak_mb()
    start = time.process_time()
    error, exit_code, message, values = "", None, "", []
    try:
        store = LogitStore.open(root)
        values = store.gather(store.stored_rows()).tolist()
        for shard in range(len(store.records)):
            for columns in store.read_shard(shard):
                columns.example_ids.to_pylist()
    except TmkdError as caught:
        error, exit_code, message = type(caught).__name__, caught.exit_code, caught.message
    except Exception as caught:  # noqa: BLE001 - what must not happen is told
        error, message = type(caught).__name__, str(caught)[:1000]
    seconds = time.process_time() - start
    return Ending(error, exit_code, message, values, seconds, _status_mb("VmHWM") - before_mb)


def _reset_peak_mb() -> float:
    """Lets the peak of resident memory start anew, and returns it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status states no {name}")


def main() -> None:
    faulthandler.enable()
    limit = int(_status_mb("VmData") * (1 << 20)) + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for line in sys.stdin:
        print(json.dumps(asdict(read_store(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()

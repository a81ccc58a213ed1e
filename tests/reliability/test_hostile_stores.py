"""A store from a stranger is data: whatever it holds, the reader refuses it or reads it, soon and in little.

Every hash and digest of these stores is right (``tests.reliability.forgery``): only what the bytes mean
can give them away. Each is opened and read whole in a child process whose memory is limited.
"""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.reliability import hostile_arrow, hostile_records
from tests.reliability.conftest import Tally
from tests.reliability.forgery import ForgedStore
from tests.reliability.hostile_case import HostileCase
from tests.reliability.hostile_reader import Ending
from tests.store_factory import make_part, make_store

ROOT = Path(__file__).parents[2]
LOGITS = np.arange(36, dtype=np.float32).reshape(12, 3)
EXCLUDED = (11,)
VALUES = np.delete(LOGITS, EXCLUDED, axis=0).tolist()
MAX_SECONDS = 2.0
# A busy machine may give it little of that.
MAX_WALL_SECONDS = 60.0
# The largest document that is read, 64 MiB of JSON, takes most of this while it is parsed.
MAX_GROWN_MB = 500.0
MAX_MESSAGE_CHARACTERS = 1000
GROUPS = {
    "links and other files": hostile_records.LINKS,
    "names of files": hostile_records.NAMES,
    "format versions": hostile_records.VERSIONS,
    "sizes and counts": hostile_records.SIZES,
    "JSON": hostile_records.JSON,
    "identity": hostile_records.IDENTITIES,
    "column types": hostile_arrow.TYPES,
    "record batches": hostile_arrow.CONTENT,
    "plans": hostile_arrow.PLANS,
}


class Reader:
    """The child process; a new one takes its place when it was killed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def read(self, root: Path) -> Ending:
        if self._child is None:
            command = [sys.executable, "-m", "tests.reliability.hostile_reader"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._child = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        print(json.dumps(str(root)), file=self._child.stdin, flush=True)
        if select.select([self._child.stdout], [], [], MAX_WALL_SECONDS)[0]:
            answer = self._child.stdout.readline()
            if answer:
                return Ending(**json.loads(answer))
        self._child.kill()
        code = self._child.wait()
        self.close()
        return Ending("killed", None, f"the process hung or ended: {code}", [], 0.0, 0.0)

    def close(self) -> None:
        if self._child is not None:
            self._child.stdin.close()
            self._child.stdout.close()
            self._child.wait()
            self._child = None


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    texts = [(f"text {row}",) for row in range(len(LOGITS))]
    part = make_part(folder / "rows.arrow", texts, [0] * len(LOGITS), shard_rows=5)
    return make_store(folder / "store", part.plan, LOGITS, batch_rows=3, excluded=EXCLUDED)


def find_fault(ending: Ending, *, harmless: bool) -> str | None:
    """Says what is wrong with how a case ended, or returns None."""
    if ending.seconds >= MAX_SECONDS or ending.grown_mb >= MAX_GROWN_MB:
        return f"took {ending.seconds:.1f} s and {ending.grown_mb:.0f} MB: {ending.message}"
    if ending.error and ending.exit_code not in (3, 4):
        return f"{ending.error}: {ending.message}"
    if len(ending.message) > MAX_MESSAGE_CHARACTERS or not ending.message.replace("\n", "\\").isprintable():
        return f"a message of {len(ending.message)} characters: {ending.message[:200]!r}"
    if harmless:
        return ending.message or (None if ending.values == VALUES else "other values")
    return None if ending.error else "was read"


def read_case(case: HostileCase, pristine: Path, folder: Path, reader: Reader) -> Ending:
    root = folder / "store"
    # In memory: synced nothing, and a tebibyte of holes may be there.
    shutil.copytree(pristine, root)
    forged = ForgedStore(root)
    case.edit(forged)
    forged.sign()
    case.after(forged)
    return reader.read(root)


def test_a_store_that_is_only_signed_again_is_read(pristine: Path, tmp_path: Path, reader: Reader) -> None:
    ending = read_case(HostileCase(), pristine, tmp_path, reader)
    assert find_fault(ending, harmless=True) is None


@pytest.mark.parametrize("group", GROUPS)
def test_a_hostile_store_is_refused_soon_in_little_memory(
    group: str, pristine: Path, tmp_path: Path, reader: Reader, tally: Tally
) -> None:
    faults = {}
    for number, (name, case) in enumerate(GROUPS[group].items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        ending = read_case(case, pristine, folder, reader)
        fault = find_fault(ending, harmless=case.harmless)
        if fault is not None:
            faults[name] = fault
        shutil.rmtree(folder)
    tried = len(GROUPS[group])
    tally("hostile store", group, tried, tried - len(faults))
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())

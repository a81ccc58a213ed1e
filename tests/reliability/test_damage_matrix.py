"""Damage to a store: every region of every file, and every way to lose or exchange whole pieces of it.

Damage is detected where default reading (open, then every row) raises ``DamagedStoreError`` or another
of the project's errors with exit code 3 or 4; a byte is harmless where the values read are the same. There
is no third ending. Nobody signs damage: that is ``test_hostile_stores``.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distill.store_reader import LogitStore
from schemas.errors import TmkdError
from schemas.records import CommitRecord, read_record
from tests.reliability.conftest import Tally
from tests.store_factory import MadePart, make_part, make_store

NUM_ROWS = 600
SHARD_ROWS = 250
# Shard 1 lies in the middle: a file before it and one after it.
SHARD = 1
LOGITS = np.random.default_rng(5).standard_normal((NUM_ROWS, 3)).astype(np.float32)
PAGE_BYTES = 4096
# Bits flipped of each kind of region, all of them where it has no more.
QUICK_FLIPS = 40
SLOW_FLIPS = 2500


@dataclass(frozen=True)
class Region:
    """Bytes ``[start, stop)`` of a file that mean one kind of thing."""

    name: str
    file: str
    start: int
    stop: int


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> MadePart:
    texts = [(f"text {row}",) for row in range(NUM_ROWS)]
    path = tmp_path_factory.mktemp("corpus") / "rows.arrow"
    return make_part(path, texts, [0] * NUM_ROWS, shard_rows=SHARD_ROWS)


@pytest.fixture(scope="module")
def pristine(part: MadePart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "store", part.plan, LOGITS, batch_rows=100)


@pytest.fixture(scope="module")
def other(part: MadePart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher's store of the same plan: files of the same names and sizes."""
    folder = tmp_path_factory.mktemp("other")
    return make_store(folder / "store", part.plan, LOGITS[::-1], batch_rows=100, teacher="another")


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "store"))


def read_all(root: Path) -> np.ndarray:
    store = LogitStore.open(root)
    return store.gather(store.stored_rows())


def is_detected(root: Path) -> bool:
    """Reads a damaged store: True if it is refused, False if its values are the right ones.

    Raises:
        AssertionError: Other values were read.
        Exception: One that is not the project's own.
    """
    try:
        values = read_all(root)
    except TmkdError as error:
        if error.exit_code not in (3, 4):
            raise
        return True
    assert np.array_equal(values, LOGITS), "silently other values"
    return False


# --- Regions ---


def find_regions(root: Path) -> list[Region]:
    """Returns the regions of every kind of file; together they cover these files without a gap."""
    record = read_record(root / "commit" / f"s{SHARD:06d}.r0.json", CommitRecord, store=root)
    data = f"data/{record.file}"
    names = ("STORE.json", "manifest.json", f"commit/s{SHARD:06d}.r0.json")
    regions = [Region(name, name, 0, (root / name).stat().st_size) for name in names]
    regions += find_file_regions(root, "plan.arrow", "plan")
    regions += find_file_regions(root, data, "data file")
    return regions


def find_file_regions(root: Path, file: str, kind: str) -> list[Region]:
    """Returns magic, schema, batches with their buffers and paddings, end mark, footer and trailer."""
    data = (root / file).read_bytes()
    footer_bytes = int.from_bytes(data[-10:-6], "little")
    footer = len(data) - 10 - footer_bytes
    regions = [Region(f"{kind}: magic", file, 0, 8)]
    offset, batch = 8, 0
    while data[offset + 4 : offset + 8] != b"\0\0\0\0":
        metadata_bytes = int.from_bytes(data[offset + 4 : offset + 8], "little")
        body = offset + 8 + metadata_bytes
        message = "schema" if offset == 8 else "batch"
        regions.append(Region(f"{kind}: {message} prefix", file, offset, offset + 8))
        regions.append(Region(f"{kind}: {message} metadata", file, offset + 8, body))
        offset = body
        if message == "batch":
            offset = body + pa.ipc.read_message(data[regions[-2].start :]).body.size
            regions += find_buffers(root / file, kind, batch, body, offset)
            batch += 1
    regions.append(Region(f"{kind}: end mark", file, offset, footer))
    regions.append(Region(f"{kind}: footer", file, footer, len(data) - 10))
    regions.append(Region(f"{kind}: footer length and magic", file, len(data) - 10, len(data)))
    return regions


def find_buffers(path: Path, kind: str, batch: int, body: int, stop: int) -> Iterator[Region]:
    """Yields a body's buffers, by column, and what lies between them."""
    with pa.memory_map(str(path)) as source:
        whole = source.read_buffer()
    columns = pa.ipc.open_file(whole).get_batch(batch)
    file = str(path.relative_to(path.parents[1])) if path.parent.name == "data" else path.name
    place = body
    for name, column in zip(columns.schema.names, columns.columns, strict=True):
        for buffer in column.buffers():
            if buffer is None or not buffer.size:
                continue
            start = buffer.address - whole.address
            if start > place:
                yield Region(f"{kind}: padding", file, place, start)
            yield Region(f"{kind}: {name}", file, start, start + buffer.size)
            place = start + buffer.size
    if stop > place:
        yield Region(f"{kind}: padding", file, place, stop)


def test_regions_cover_their_files(pristine: Path) -> None:
    regions = find_regions(pristine)
    for file in {region.file for region in regions}:
        spans = sorted((region.start, region.stop) for region in regions if region.file == file)
        starts, stops = zip(*spans, strict=True)
        assert (0, *stops) == (*starts, (pristine / file).stat().st_size)
    kinds = {region.name for region in regions}
    assert {"data file: logits", "data file: padding", "plan: example_id", "plan: footer"} <= kinds


@pytest.mark.parametrize(
    ("seed", "num_flips"),
    [
        pytest.param(1, QUICK_FLIPS, id="quick"),
        pytest.param(2, SLOW_FLIPS, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_flipped_bit_in_any_region_is_detected_or_harmless(
    seed: int, num_flips: int, root: Path, tally: Tally
) -> None:
    rng = random.Random(seed)
    by_kind: dict[str, list[Region]] = {}
    for region in find_regions(root):
        by_kind.setdefault(region.name, []).append(region)
    missed = {}
    for kind, regions in by_kind.items():
        detected = tried = 0
        for region, bit in pick_bits(rng, regions, num_flips):
            detected += flip_and_read(root, region.file, bit)
            tried += 1
        tally("flipped bits", kind, tried, detected)
        if detected != tried:
            missed[kind] = f"{tried - detected} of {tried}"
    # Every byte is under some hash: none is merely harmless.
    assert missed == {}
    assert np.array_equal(read_all(root), LOGITS)


def pick_bits(rng: random.Random, regions: list[Region], count: int) -> list[tuple[Region, int]]:
    """Returns bits of regions, as numbers within the file: all of them, or a sample of ``count``."""
    sizes = [8 * (region.stop - region.start) for region in regions]
    chosen = rng.sample(range(sum(sizes)), min(count, sum(sizes)))
    bits = []
    for place in sorted(chosen):
        for region, size in zip(regions, sizes, strict=True):
            if place < size:
                bits.append((region, 8 * region.start + place))
                break
            place -= size
    return bits


def flip_and_read(root: Path, file: str, bit: int) -> bool:
    path = root / file
    byte = bit // 8
    with path.open("r+b", buffering=0) as opened:
        opened.seek(byte)
        old = opened.read(1)
        opened.seek(byte)
        opened.write(bytes([old[0] ^ 1 << bit % 8]))
        try:
            return is_detected(root)
        finally:
            opened.seek(byte)
            opened.write(old)


# --- Pieces ---


def edges(root: Path, file: str) -> list[int]:
    """Returns where the regions of a file start and end."""
    found = [region for region in find_regions(root) if region.file == file]
    return sorted({0, *(region.start for region in found), *(region.stop for region in found)})


def data_file(root: Path, shard: int = SHARD) -> Path:
    return root / f"data/s{shard:06d}-test.arrow"


def cuts(root: Path) -> list[tuple[str, bytes]]:
    """Yields each file cut at each of its edges and a byte around it."""
    found = []
    for region_file in dict.fromkeys(region.file for region in find_regions(root)):
        data = (root / region_file).read_bytes()
        places = {edge + step for edge in edges(root, region_file) for step in (-1, 0, 1)}
        found += [(region_file, data[:place]) for place in sorted(places) if 0 <= place < len(data)]
    return found


def zeroed_pages(root: Path) -> list[tuple[str, bytes]]:
    """Returns each file with a 4 KiB page of zeros in the place of each of its pages."""
    found = []
    for file in dict.fromkeys(region.file for region in find_regions(root)):
        data = (root / file).read_bytes()
        for start in range(0, len(data), PAGE_BYTES):
            page = bytes(len(data[start : start + PAGE_BYTES]))
            found.append((file, data[:start] + page + data[start + PAGE_BYTES :]))
    return found


def garbage_at_the_end(root: Path) -> list[tuple[str, bytes]]:
    found = []
    for file in dict.fromkeys(region.file for region in find_regions(root)):
        data = (root / file).read_bytes()
        found += [(file, data + more) for more in (b"\0", b"\n", b"x" * 8, bytes(PAGE_BYTES), data)]
    return found


def same_size(root: Path) -> list[tuple[str, bytes]]:
    """Returns other content of the same size."""
    found = []
    for file in dict.fromkeys(region.file for region in find_regions(root)):
        data = (root / file).read_bytes()
        found += [(file, bytes(len(data))), (file, data[::-1]), (file, data[8:] + data[:8])]
    return found


def moved_batches(root: Path) -> list[tuple[str, bytes]]:
    """Returns the data file with a record batch there twice, left out, exchanged, or over another."""
    path = data_file(root)
    record = read_record(root / "commit" / f"s{SHARD:06d}.r0.json", CommitRecord, store=root)
    data = path.read_bytes()
    pieces = [data[region.offset : region.offset + region.length] for region in record.regions()]
    head, *batches, tail = pieces
    orders = [[0, 0, 1, 2], [1, 2], [0, 2], [1, 0, 2], [2, 1, 0], [0, 0, 2], [1, 1, 2], [], [0, 1, 2, 2]]
    name = f"data/{path.name}"
    return [(name, b"".join([head, *(batches[index] for index in order), tail])) for order in orders]


CONTENTS: dict[str, Callable[[Path], list[tuple[str, bytes]]]] = {
    "truncated at a boundary or a byte beside it": cuts,
    "a page of zeros": zeroed_pages,
    "garbage at the end": garbage_at_the_end,
    "other content of the same size": same_size,
    "record batches twice, lost, exchanged": moved_batches,
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_of_damaged_content_is_detected(kind: str, root: Path, tally: Tally) -> None:
    tried, missed = 0, []
    for file, data in CONTENTS[kind](root):
        original = (root / file).read_bytes()
        if data == original:
            continue
        (root / file).write_bytes(data)
        tried += 1
        # Nothing binds the manifest's bytes but its digest, which leaves out the white space of JSON.
        is_harmless = file == "manifest.json" and data.strip() == original.strip()
        if is_detected(root) == is_harmless:
            missed.append((file, len(original), len(data)))
        (root / file).write_bytes(original)
    tally("damage", kind, tried, tried - len(missed))
    assert missed == []
    assert tried >= 9


def exchange(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def swap_data(root: Path, other: Path) -> None:
    exchange(data_file(root, 0), data_file(root, 1))


def swap_records(root: Path, other: Path) -> None:
    exchange(root / "commit/s000000.r0.json", root / "commit/s000001.r0.json")


def swap_shards(root: Path, other: Path) -> None:
    swap_data(root, other)
    swap_records(root, other)


def take(*names: str) -> Callable[[Path, Path], None]:
    """Files of another teacher's store of the same plan."""

    def copy(root: Path, other: Path) -> None:
        for name in names:
            shutil.copy(other / name, root / name)

    return copy


EXCHANGES: dict[str, Callable[[Path, Path], None]] = {
    "data files of two shards": swap_data,
    "records of two shards": swap_records,
    "data files and records of two shards": swap_shards,
    "another teacher's data file": take("data/s000001-test.arrow"),
    "another teacher's record": take("commit/s000001.r0.json"),
    "another teacher's data file and record": take("data/s000001-test.arrow", "commit/s000001.r0.json"),
    "another teacher's manifest": take("manifest.json"),
    "another teacher's manifest and STORE.json": take("manifest.json", "STORE.json"),
    "another teacher's STORE.json": take("STORE.json"),
    "another teacher's records and manifest": take(
        "manifest.json", *(f"commit/s{shard:06d}.r0.json" for shard in range(3))
    ),
    "all of another teacher but its data": take(
        "manifest.json", "STORE.json", *(f"commit/s{shard:06d}.r0.json" for shard in range(3))
    ),
}


@pytest.mark.parametrize("kind", EXCHANGES)
def test_exchanged_files_are_detected(kind: str, root: Path, other: Path, tally: Tally) -> None:
    assert data_file(root).stat().st_size == data_file(other).stat().st_size
    EXCHANGES[kind](root, other)
    detected = is_detected(root)
    tally("damage", "files exchanged between shards and stores", 1, int(detected))
    assert detected


def test_the_same_plan_of_another_store_is_no_damage(root: Path, other: Path) -> None:
    take("plan.arrow")(root, other)
    assert not is_detected(root)


def test_damage_after_a_batch_was_read_is_seen_by_the_next_reader(root: Path, tally: Tally) -> None:
    store = LogitStore.open(root)
    store.gather(np.array([SHARD_ROWS]))
    record = store.records[SHARD]
    detected = 0
    for batch in record.batches:
        detected += flip_and_read(root, f"data/{record.file}", 8 * (batch.offset + batch.length - 1))
    tally("damage", "a map that was read before", len(record.batches), detected)
    assert detected == len(record.batches)

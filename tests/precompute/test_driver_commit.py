import uuid
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from precompute.driver_commit import commit_receipt
from precompute.store_writer import StoreWriter
from precompute.tasks import ShardReceipt
from schemas.errors import ResourceError
from schemas.plan import make_plan
from tests.precompute.tiny import make_batches, make_identity, make_rows, open_store


class UnconditionalFileSystem(MemoryFileSystem):
    """A service that cannot create a file only if it is absent, and says so."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create":
            raise NotImplementedError
        super().pipe_file(path, value, mode=mode, **options)


def receive(store: StoreWriter, shard: int) -> ShardReceipt:
    task = store.plan.tasks()[shard]
    record = store.write_data(task, make_batches(store, task))
    return ShardReceipt(store.root, shard, task.num_rows, 0, 1, 1, 1.0, 1.0, committed=False, record=record)


def test_the_driver_commits_each_shard_once_and_the_second_file_goes(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", make_rows(20))
    first, second = receive(store, 0), receive(store, 0)
    assert store.committed_shards() == frozenset(), "a worker that does not commit has committed"
    done = commit_receipt(first)
    assert done.committed
    assert done.record is None
    assert not commit_receipt(second).committed
    assert first.record is not None
    assert store.commit_records()[0].record == first.record
    assert [path.name for path in (tmp_path / "store" / "data").iterdir()] == [first.record.file]


def test_a_receipt_of_a_worker_that_committed_is_left_alone(tmp_path: Path) -> None:
    receipt = ShardReceipt(str(tmp_path), 0, 1, 0, 1, 1, 1.0, 1.0, committed=True)
    assert commit_receipt(receipt) is receipt


def test_the_driver_commits_where_the_service_knows_no_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.get_filesystem_class", lambda _: UnconditionalFileSystem)
    monkeypatch.setattr("fsspec.filesystem", lambda _, **__: UnconditionalFileSystem())
    monkeypatch.setattr("schemas.storage.filesystem._filesystems", {})
    plan = make_plan(make_rows(20), 8)
    identity = make_identity(plan)
    root = f"memory://{uuid.uuid4().hex}"
    with pytest.raises(ResourceError, match="single_committer"):
        StoreWriter.open(root, identity, plan)
    store = StoreWriter.open(root, identity, plan, single_committer=True)
    for shard in range(plan.num_shards):
        # As a worker does, which opens the store by its location alone.
        assert commit_receipt(receive(StoreWriter.attach(root), shard)).committed
    assert store.finish().num_rows == 20

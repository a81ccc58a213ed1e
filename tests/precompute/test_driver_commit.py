from pathlib import Path

from precompute.driver_commit import commit_receipt
from precompute.store_writer import StoreWriter
from precompute.tasks import ShardReceipt
from tests.precompute.test_store_writer import make_batches, open_store
from tests.precompute.tiny import make_rows


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

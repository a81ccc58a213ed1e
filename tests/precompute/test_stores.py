"""Making the stores of a run, with tiny teachers on a real local Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.ray_session import ray_session
from precompute.events import ProgressEvent
from precompute.interrupt import StopFlag
from precompute.materialised import MaterialisedPart
from precompute.store_writer import StoreWriter
from precompute.stores import StoreKey, StoreRequest, StoreSettings, make_stores
from schemas.errors import (
    DataError,
    IncompleteStoreError,
    InterruptedRunError,
    LabelError,
    RecipeError,
    RefusedError,
)
from schemas.plan import make_plan
from schemas.recipe import Corpus, FilePart, StoreOptions, Teacher
from schemas.records import MANIFEST_FILE
from tests.precompute.tiny import LABELS, make_batches, make_rows, open_store, save_tiny_bert, write_rows

NUM_ROWS = 20
CORPUS = Corpus(
    labels=tuple(reversed(LABELS)),
    text=("a", "b"),
    parts=(FilePart(kind="file", path="train.jsonl", name="train"),),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("model"))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Maker:
    """Calls ``make_stores`` below a directory, and counts what it starts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.events: list[ProgressEvent] = []
        self.num_sessions = 0
        self.may_start = True
        self.stop = StopFlag()

    def part(self, name: str = "train", *, seed: int = 0, num_rows: int = NUM_ROWS) -> MaterialisedPart:
        rows = make_rows(num_rows, name, seed)
        path = write_rows(rows, self.directory / f"{name}-{seed}-{num_rows}.arrow")
        return MaterialisedPart(
            "toy", name, path, make_plan(rows, 8).fingerprint, "b" * 64, num_rows, (), num_rows
        )

    def __call__(
        self, *requests: StoreRequest, new_store: bool = False, shard_rows: int = 8
    ) -> dict[StoreKey, Path]:
        settings = StoreSettings(
            root=str(self.directory / "stores"),
            hash_cache=self.directory / "weights.json",
            options=StoreOptions(shard_rows=shard_rows, batch_rows=4, max_attempts=1),
            new_store=new_store,
        )
        roots = make_stores(
            requests, settings, session=self.session, on_progress=self.events.append, stop=self.stop
        )
        return {key: Path(root) for key, root in roots.items()}

    def session(self) -> AbstractContextManager[object]:
        assert self.may_start, "a cluster was started although there is nothing to do"
        self.num_sessions += 1
        return ray_session(num_cpus=2)


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def request_of(model: Path, part: MaterialisedPart, **teacher: object) -> StoreRequest:
    fields: dict[str, object] = {"name": "tiny", "model": str(model), "max_length": 32} | teacher
    return StoreRequest(Teacher.model_validate(fields), str(model), None, CORPUS, part)


def given_request(root: Path | str, part: MaterialisedPart, name: str = "old") -> StoreRequest:
    return StoreRequest(Teacher(name=name, stores=(str(root),)), None, None, CORPUS, part)


def read_logits(root: Path) -> pa.Table:
    store = StoreWriter.attach(root)
    tables = []
    for record in [commit.record for commit in store.commit_records().values()]:
        with pa.memory_map(str(root / "data" / record.file)) as source:
            tables.append(pa.ipc.open_file(source).read_all())
    return pa.concat_tables(tables)


@pytest.fixture
def given(tmp_path: Path, make: Maker) -> StoreWriter:
    """A finished store that some other run made, cut into shards of 8."""
    store = open_store(tmp_path / "given", make_rows(NUM_ROWS), 8)
    for task in store.plan.tasks():
        store.write_shard(task, make_batches(store, task))
    store.finish()
    return store


@pytest.mark.usefixtures("local_ray")
def test_stores_of_two_parts_are_never_computed_twice(model: Path, make: Maker, tmp_path: Path) -> None:
    parts = [make.part("train"), make.part("more", seed=1, num_rows=5)]
    requests = [request_of(model, part) for part in parts]
    roots = make(*requests)
    assert len(set(roots.values())) == 2
    assert make.num_sessions == 1
    for (_, _, part), root in roots.items():
        assert (root / MANIFEST_FILE).exists()
        assert read_logits(root).num_rows == {"train": NUM_ROWS, "more": 5}[part]
    last = make.events[-1]
    assert (last.teacher, last.state, last.num_rows_done, last.num_shards_done) == ("tiny", "done", 25, 4)

    make.may_start = False
    # Nor is the teacher opened: its weights are known by their size and time alone.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").rglob("*")}
    assert make(*requests) == roots
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").rglob("*")} == before

    # A shard is lost: it alone is computed again, and the same rows come out.
    key = ("tiny", "toy", "train")
    whole = read_logits(roots[key])
    commit = StoreWriter.attach(roots[key]).commit_records()[1]
    (roots[key] / MANIFEST_FILE).unlink()
    (roots[key] / "commit" / commit.name).unlink()
    (roots[key] / "data" / commit.record.file).unlink()
    kept = {path: path.read_bytes() for path in (roots[key] / "commit").iterdir()}
    make.may_start = True
    make(requests[0])
    assert make.num_sessions == 2
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert read_logits(roots[key]).equals(whole)

    # All shards committed, no manifest: it is finished without a cluster.
    (roots[key] / MANIFEST_FILE).unlink()
    make.may_start = False
    make(requests[0])
    assert (roots[key] / MANIFEST_FILE).exists()


def test_a_model_takes_over_the_cut_of_a_given_store_of_the_same_part(
    model: Path, make: Maker, given: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.pool.run_pool", lambda *_, **__: make.stop.set(2))
    monkeypatch.setattr(make, "session", _nothing)
    part = make.part()
    with pytest.raises(InterruptedRunError):
        make(request_of(model, part), given_request(given.root, part), shard_rows=5)
    (root,) = (make.directory / "stores").iterdir()
    assert StoreWriter.attach(root).plan.plan_hash == given.plan.plan_hash


def test_labels_that_do_not_map_are_refused_before_any_work(model: Path, make: Maker) -> None:
    make.may_start = False
    request = request_of(model, make.part(), label_map={"entailment": "yes"})
    with pytest.raises(LabelError, match=r"tiny\.label_map"):
        make(request)
    assert not (make.directory / "stores").exists()


def test_a_teacher_without_label_names_is_refused(tmp_path: Path, make: Maker) -> None:
    make.may_start = False
    path = save_tiny_bert(tmp_path / "nameless", labels=("LABEL_0", "LABEL_1"))
    with pytest.raises(LabelError, match="LABEL_0"):
        make(request_of(path, make.part()))


def test_a_near_miss_is_refused_unless_a_new_store_is_wanted(
    model: Path, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.pool.run_pool", lambda *_, **__: make.stop.set(2))
    monkeypatch.setattr(make, "session", _nothing)
    part = make.part()
    with pytest.raises(InterruptedRunError):
        make(request_of(model, part))
    make.stop = StopFlag()
    with pytest.raises(RefusedError, match="max_length: 32 -> 16") as caught:
        make(request_of(model, part, max_length=16))
    assert "--new-store" in str(caught.value)
    assert caught.value.exit_code == 4
    with pytest.raises(InterruptedRunError):
        make(request_of(model, part, max_length=16), new_store=True)
    assert len(list((make.directory / "stores").iterdir())) == 2


def test_a_stop_before_the_work_is_an_interruption(model: Path, make: Maker) -> None:
    make.may_start = False
    make.stop.set(15)
    with pytest.raises(InterruptedRunError) as caught:
        make(request_of(model, make.part()))
    assert caught.value.exit_code == 143


def test_rows_that_changed_under_their_fingerprint_are_refused(model: Path, make: Maker) -> None:
    part = make.part()
    write_rows(make_rows(NUM_ROWS, seed=9), part.rows_path)
    with pytest.raises(DataError, match="have changed"):
        make(request_of(model, part))


def test_a_given_store_is_found_by_its_rows_and_starts_nothing(make: Maker, given: StoreWriter) -> None:
    make.may_start = False
    request = given_request(given.root, make.part())
    # The recipe's cut is another one: the store's counts.
    assert make(request, shard_rows=7) == {request.key: Path(given.root)}


def test_a_given_store_of_other_rows_is_refused_and_named(make: Maker, given: StoreWriter) -> None:
    request = given_request(given.root, make.part(seed=3))
    with pytest.raises(DataError, match=r"none of its stores covers toy/train .*they cover given: toy/train"):
        make(request)


def test_a_given_store_that_is_not_finished_is_refused(make: Maker, given: StoreWriter) -> None:
    (Path(given.root) / MANIFEST_FILE).unlink()
    request = given_request(given.root, make.part())
    with pytest.raises(IncompleteStoreError):
        make(request)


def test_a_given_store_that_is_not_there_is_refused(make: Maker) -> None:
    request = given_request("/nowhere", make.part())
    with pytest.raises(DataError, match="no store at /nowhere"):
        make(request)


def test_given_stores_of_one_part_with_different_cuts_are_refused(
    make: Maker, given: StoreWriter, tmp_path: Path
) -> None:
    other = open_store(tmp_path / "other", make_rows(NUM_ROWS), 5)
    for task in other.plan.tasks():
        other.write_shard(task, make_batches(other, task))
    other.finish()
    part = make.part()
    requests = [given_request(store.root, part, name) for name, store in (("one", given), ("two", other))]
    with pytest.raises(RefusedError, match="cut into different shards"):
        make(*requests)


def test_a_cut_into_more_shards_than_a_store_may_have_is_refused_before_any_work(
    model: Path, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.may_start = False
    monkeypatch.setattr("precompute.targets.MAX_SHARDS", 3)
    with pytest.raises(RecipeError, match=r"store\.shard_rows: .* at most 3"):
        make(request_of(model, make.part()), shard_rows=1)
    assert not (make.directory / "stores").exists()

"""A store is taken up only by the run that it belongs to, and then whoever takes it up ends it alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from cluster.ray_session import ray_session
from precompute.events import ProgressEvent
from precompute.interrupt import StopFlag
from precompute.materialised import MaterialisedPart
from precompute.store_writer import StoreWriter
from precompute.stores import StoreRequest, StoreSettings, make_stores
from schemas.errors import InterruptedRunError, LabelError, RefusedError, TmkdError
from schemas.plan import make_plan
from schemas.recipe import Corpus, FilePart, StoreOptions, Teacher
from tests.precompute.tiny import LABELS, make_texts, save_tiny_bert, write_rows
from tests.reliability.here_pool import HerePool
from tests.reliability.trials import counted
from tests.store_factory import make_table
from tests.tally import Tally

NUM_ROWS = 20
SHARD_ROWS = 4


@dataclass(frozen=True)
class Setup:
    """What a run is given.

    Attributes:
        directory: Where everything lies.
        texts: The corpus.
        teacher: Fields of the recipe's teacher.
        shard_rows: The recipe's shard size.
        labels: The corpus's labels.
    """

    directory: Path
    texts: tuple[tuple[str, str], ...]
    teacher: dict[str, object]
    shard_rows: int = SHARD_ROWS
    labels: tuple[str, ...] = LABELS

    @property
    def model(self) -> Path:
        """The teacher's directory."""
        return self.directory / "model"

    @property
    def stores(self) -> Path:
        """Where stores go."""
        return self.directory / "stores"

    def part(self) -> MaterialisedPart:
        """Writes the corpus."""
        rows = make_table(self.texts, [0] * len(self.texts))
        fingerprint = make_plan(rows, 1).fingerprint
        path = write_rows(rows, self.directory / f"{fingerprint[:16]}.arrow")
        return MaterialisedPart("toy", "train", path, fingerprint, "b" * 64, len(self.texts), (), 0)

    def run(self, stop: StopFlag | None = None, on_progress: Callable[[ProgressEvent], None] = print) -> Path:
        """Makes the store."""
        fields: dict[str, object] = {"name": "tiny", "model": str(self.model), "max_length": 32}
        corpus = Corpus(
            labels=self.labels,
            text=("a", "b"),
            parts=(FilePart(kind="file", path="train.jsonl", name="train"),),
        )
        teacher = Teacher.model_validate(fields | self.teacher)
        request = StoreRequest(teacher, str(self.model), None, corpus, self.part())
        settings = StoreSettings(
            root=str(self.stores),
            hash_cache=self.directory / "weights.json",
            options=StoreOptions(shard_rows=self.shard_rows, batch_rows=3, max_attempts=1),
        )
        roots = make_stores(
            [request], settings, session=_nothing, on_progress=on_progress, stop=stop or StopFlag()
        )
        return Path(roots[request.key])


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> HerePool:
    found = HerePool()
    # In place of the module, so that Ray is not even imported.
    monkeypatch.setitem(sys.modules, "precompute.pool", SimpleNamespace(run_pool=found.run_pool))
    return found


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    save_tiny_bert(tmp_path / "model")
    return Setup(tmp_path, tuple(make_texts(NUM_ROWS)), {})


def change_text(setup: Setup) -> Setup:
    texts = list(setup.texts)
    texts[7] = (texts[7][0] + " .", texts[7][1])
    return replace(setup, texts=tuple(texts))


def add_row(setup: Setup) -> Setup:
    return replace(setup, texts=(*setup.texts, ("the cat", "sat")))


def swap_rows(setup: Setup) -> Setup:
    return replace(setup, texts=(setup.texts[1], setup.texts[0], *setup.texts[2:]))


def change_weights(setup: Setup) -> Setup:
    save_tiny_bert(setup.model, seed=1)
    return setup


def change_tokenizer(setup: Setup) -> Setup:
    path = setup.model / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"cat"', '"cot"', 1))
    assert path.read_text() != text
    return setup


def change_config(setup: Setup) -> Setup:
    _edit_config(setup, hidden_act="relu")
    return setup


def rename_native_labels(setup: Setup) -> Setup:
    # The teacher says now that its first logit is what its second one was.
    _edit_config(setup, id2label=dict(enumerate(reversed(LABELS))))
    return setup


def _edit_config(setup: Setup, **changes: object) -> None:
    path = setup.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_teacher(**fields: object) -> Callable[[Setup], Setup]:
    return lambda setup: replace(setup, teacher=fields)


CHANGES: dict[str, tuple[Callable[[Setup], Setup], str]] = {
    "text of the corpus": (change_text, "corpus"),
    "rows of the corpus": (add_row, "corpus"),
    "order of the corpus": (swap_rows, "corpus"),
    "shard size": (lambda setup: replace(setup, shard_rows=5), "shard_rows"),
    "teacher weights": (change_weights, "weights"),
    "tokenizer": (change_tokenizer, "tokenizer"),
    "teacher configuration": (change_config, "config"),
    "teacher's own label names": (rename_native_labels, "native_labels"),
    "max_length": (with_teacher(max_length=16), "max_length"),
    "truncation": (with_teacher(truncation="only_first"), "truncation"),
    "dtype": (with_teacher(dtype="bfloat16"), "dtype"),
    "attention": (with_teacher(attention="eager"), "attention"),
}


def _snapshot(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def _start(setup: Setup, pool: HerePool, num_shards: int | None) -> None:
    """Makes the store, or its first shards only."""
    pool.stop_after = num_shards
    if num_shards is None:
        setup.run()
        return
    with pytest.raises(InterruptedRunError):
        setup.run()
    pool.stop_after = None


@pytest.mark.parametrize("num_shards", [2, None], ids=["interrupted", "finished"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_store_is_not_taken_up_with_something_changed_and_the_field_is_named(
    setup: Setup, pool: HerePool, tally: Tally, name: str, num_shards: int | None
) -> None:
    change, field = CHANGES[name]
    _start(setup, pool, num_shards)
    before, num_done = _snapshot(setup.stores), len(pool.done)
    with counted(tally, "resume", f"changed {name}: refused, {field} named") as trials, trials.attempt():
        with pytest.raises(RefusedError) as caught:
            change(setup).run()
        assert caught.value.exit_code == 4
        assert [part.split(":")[0] for part in caught.value.differing] == [field]
        assert all(part in str(caught.value) for part in caught.value.differing)
        assert _snapshot(setup.stores) == before
        assert len(pool.done) == num_done


def test_a_changed_corpus_is_refused_also_where_the_old_plan_cannot_be_read(
    setup: Setup, pool: HerePool
) -> None:
    root = setup.run()
    (root / "plan.arrow").write_bytes(b"ARROW1")
    with pytest.raises(RefusedError) as caught:
        change_text(setup).run()
    assert [part.split(":")[0] for part in caught.value.differing] == ["plan_hash"]


def test_corpus_and_shard_size_are_both_named_with_what_they_were(setup: Setup, pool: HerePool) -> None:
    setup.run()
    with pytest.raises(RefusedError) as caught:
        replace(add_row(setup), shard_rows=5).run()
    corpus, shard_rows = caught.value.differing
    assert corpus.startswith("corpus: 20 rows, fingerprint ")
    assert " -> 21 rows, fingerprint " in corpus
    assert shard_rows == "shard_rows: 4 -> 5"


def test_a_corpus_of_one_shard_that_grew_has_the_same_shard_size(setup: Setup, pool: HerePool) -> None:
    whole = replace(setup, shard_rows=1000)
    whole.run()
    with pytest.raises(RefusedError) as caught:
        add_row(whole).run()
    assert [part.split(":")[0] for part in caught.value.differing] == ["corpus"]


@pytest.mark.parametrize("num_shards", [2, None], ids=["interrupted", "finished"])
@pytest.mark.parametrize(
    ("teacher", "labels"),
    [({"label_map": {"entailment": "yes"}}, LABELS), ({}, ("yes", "no"))],
    ids=["label map", "label names"],
)
def test_labels_that_do_not_map_any_more_are_refused_and_the_label_map_is_named(
    setup: Setup,
    pool: HerePool,
    tally: Tally,
    num_shards: int | None,
    teacher: dict[str, object],
    labels: tuple[str, ...],
) -> None:
    _start(setup, pool, num_shards)
    before = _snapshot(setup.stores)
    with counted(tally, "resume", "changed label map: refused, label_map named") as trials, trials.attempt():
        with pytest.raises(LabelError) as caught:
            replace(setup, teacher=teacher, labels=labels).run()
        assert caught.value.field == "teachers.tiny.label_map"
        assert _snapshot(setup.stores) == before


def test_a_label_map_that_fits_costs_nothing_and_leaves_the_store_as_it_is(
    setup: Setup, pool: HerePool
) -> None:
    root = setup.run()
    before, num_done = _snapshot(setup.stores), len(pool.done)
    renamed = {"entailment": "yes", "not_entailment": "no"}
    assert replace(setup, teacher={"label_map": renamed}, labels=("no", "yes")).run() == root
    assert _snapshot(setup.stores) == before
    assert len(pool.done) == num_done


def test_the_restored_recipe_goes_on_where_it_was_interrupted(setup: Setup, pool: HerePool) -> None:
    _start(setup, pool, 2)
    with pytest.raises(TmkdError):
        change_text(setup).run()
    setup.run()
    assert sorted(pool.done) == list(range(NUM_ROWS // SHARD_ROWS))


def _content(root: Path) -> list[tuple[str, pa.Table]]:
    """Returns of each shard its hash and its rows."""
    store = StoreWriter.attach(str(root))
    found = []
    for commit in store.commit_records().values():
        with pa.memory_map(str(root / "data" / commit.record.file)) as source:
            found.append((commit.record.sha256, pa.ipc.open_file(source).read_all()))
    return found


@pytest.mark.parametrize("actors", [(1, 2, 3), (3, 1, 2), (2, 5), (1,)])
def test_another_number_of_actors_makes_the_same_rows(
    setup: Setup, pool: HerePool, tally: Tally, tmp_path: Path, actors: tuple[int, ...]
) -> None:
    whole = _content(setup.run())
    pool.done.clear()
    moved = replace(setup, directory=tmp_path / "again")
    save_tiny_bert(moved.model)
    with counted(tally, "resume", "another number of actors: the same rows") as trials:
        for num_actors in actors:
            with trials.attempt():
                _start(replace(moved, teacher={"num_actors": num_actors}), pool, 1)
        with trials.attempt():
            found = _content(replace(moved, teacher={"num_actors": 4}).run())
            assert sorted(pool.done) == list(range(NUM_ROWS // SHARD_ROWS))
            assert [digest for digest, _ in found] == [digest for digest, _ in whole]
            assert all(ours.equals(theirs) for (_, ours), (_, theirs) in zip(found, whole, strict=True))


@pytest.mark.slow
def test_two_ray_actors_end_what_one_began_with_the_same_rows(
    setup: Setup, tally: Tally, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "precompute.pool", SimpleNamespace(run_pool=HerePool().run_pool))
        whole = _content(setup.run())
    moved = replace(setup, directory=tmp_path / "again")
    save_tiny_bert(moved.model)
    stop = StopFlag()

    def stop_early(event: ProgressEvent) -> None:
        if event.num_shards_done:
            stop.set()

    case = "one Ray actor interrupted, two go on: the same rows"
    with counted(tally, "resume", case) as trials, trials.attempt(), ray_session(num_cpus=2):
        with pytest.raises(InterruptedRunError):
            moved.run(stop, stop_early)
        found = _content(replace(moved, teacher={"num_actors": 2}).run())
        assert [digest for digest, _ in found] == [digest for digest, _ in whole]

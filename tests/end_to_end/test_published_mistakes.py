"""What went wrong in published implementations of this method: each mistake, and the test that holds it off.

1. Student "accuracy" measured against the teacher's argmax: below; for the held-out rows of a training
   ``tests/distill/test_held_out.py::test_accuracy_and_macro_f1_are_those_of_scikit_learn``.
2. An unseeded shuffle per teacher, so that votes mixed different rows: below, where stores are read;
   where they are written ``tests/precompute/test_worker.py::
   test_a_shard_has_the_same_bytes_whatever_the_worker_did_before``, ``tests/reliability/
   test_resume_refusals.py::test_another_number_of_actors_makes_the_same_rows`` and ``tests/reliability/
   test_interrupted_shards.py::test_rows_that_are_not_those_of_the_plan_publish_nothing``.
3. Logits sliced with the size of the last, short batch. Teachers: ``tests/precompute/test_worker.py::
   test_logits_are_those_of_a_plain_forward_pass_over_each_row_alone`` (50 rows that no batch divides).
   Students: ``tests/distill/test_loader.py::test_an_epoch_is_every_row_once_and_its_last_step_is_short``,
   ``tests/distill/test_losses.py::test_a_step_cut_into_micro_batches_with_padding_has_the_same_loss`` and
   ``tests/distill/test_trainer.py::test_the_step_is_independent_of_the_number_of_ranks``.
4. Softmax applied twice: below; the losses by hand in ``tests/distill/test_losses.py``.
5. A one-head student of the teachers' mean (1avg-o-1) called m-o-1: below for the losses; for the jobs
   ``tests/cluster/test_arms.py::test_one_average_is_one_head_over_all_teachers_and_is_not_many_to_one``.
6. Checkpoints that always recorded the last epoch: ``tests/distill/test_trainer.py::
   test_the_best_step_is_kept_and_patience_ends_the_training``.
7. One-hot width from the batch's largest label: below.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.arms import AVERAGE_HEAD
from cluster.evaluation import evaluate_models
from cluster.model_outputs import EvaluatedRows, ModelOutput, student_name
from distill.join import JoinedCorpus
from distill.losses import golden_loss
from distill.objective import Objective
from distill.student import MultiHeadStudent
from precompute.encode import encode_rows
from precompute.store_writer import StoreWriter
from schemas.digest import hash_value
from schemas.errors import DamagedStoreError
from schemas.job import GOLDEN_HEAD
from schemas.records import StoreIdentity
from schemas.rows import classification_schema
from tests.distill.tiny_models import TEXTS, config_init, save_tokenizer
from tests.store_factory import MadePart, make_part, make_store, take_keys, target, write_store

LABELS = ("a", "b", "c")
NUM_ROWS = 23


@pytest.fixture
def part(tmp_path: Path) -> MadePart:
    """23 rows in shards of 10: neither shards nor batches divide them. No row has the last label."""
    texts = [(f"question {row}", f"passage {row}") for row in range(NUM_ROWS)]
    labels = [row % 2 for row in range(NUM_ROWS)]
    return make_part(tmp_path / "corpus" / "rows.arrow", texts, labels, shard_rows=10)


def identity_of(part: MadePart, teacher: str) -> StoreIdentity:
    generation = {"weights": teacher}
    return StoreIdentity(
        plan_hash=part.plan.plan_hash,
        generation_hash=hash_value(generation),
        generation=generation,
        native_labels=LABELS,
        teacher=teacher,
        corpus="corpus",
        part="train",
    )


def votes(teacher: int, rows: np.ndarray) -> np.ndarray:
    """Logits that tell teacher, row and label."""
    return (1000 * teacher + 10 * rows[:, None] + np.arange(3)).astype(np.float32)


def write_votes(root: Path, part: MadePart, teacher: int, *, shards: list[int], batch_rows: int) -> Path:
    """Writes a teacher's store with the real writer, its shards in the order given."""
    writer = StoreWriter.open(root, identity_of(part, f"t{teacher}"), part.plan)
    tasks = part.plan.tasks()
    for task in (tasks[shard] for shard in shards):
        rows = part.plan.rows.slice(task.start, task.num_rows)
        logits_RC = votes(teacher, np.arange(task.start, task.stop))
        writer.write_shard(task, list(encode_rows(rows, logits_RC, writer.schema, batch_rows)))
    writer.finish()
    return root


def soft_loss(joined: JoinedCorpus, student_BNC: torch.Tensor, rows: np.ndarray) -> float:
    """The mean soft loss of rows, as a stage with soft labels only computes it."""
    found = joined.gather(rows)
    objective = Objective(
        uses_golden=False, num_soft=joined.num_targets, alpha=1.0, soft_loss="mse", temperature=1.0
    )
    labels_B, weights_B = torch.from_numpy(found.labels), torch.ones(len(rows))
    losses = objective.sum_losses(student_BNC, labels_B, torch.from_numpy(found.logits_BNC), weights_B)
    return losses.total.item() / len(rows)


def test_accuracy_is_against_the_golden_label_and_not_against_the_teacher() -> None:
    # Golden a, a, b, b. The teacher is right once; the student copies it row for row.
    copied_NC = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1]])
    outputs = [
        ModelOutput("t", "teacher", copied_NC, teacher="t", num_parameters=1),
        ModelOutput(student_name("tmkd", None), "student", copied_NC, arm="tmkd", seed=1, num_parameters=1),
    ]
    evaluation = evaluate_models(EvaluatedRows("dev", LABELS[:2], np.array([0, 0, 1, 1])), outputs)
    (student,) = [model for model in evaluation.models if model.name == "tmkd"]
    assert student.accuracy == 0.25
    assert student.agreement == {"t": 1.0}
    # Nor do intervals know the teacher's word: four rows of which one is right are never all right.
    assert student.accuracy_interval.low < student.accuracy < student.accuracy_interval.high < 1.0


def test_votes_of_one_row_are_joined_whatever_order_and_batches_their_stores_were_written_in(
    part: MadePart, tmp_path: Path
) -> None:
    first = write_votes(tmp_path / "t1", part, 1, shards=[0, 1, 2], batch_rows=4)
    second = write_votes(tmp_path / "t2", part, 2, shards=[2, 0, 1], batch_rows=7)
    third = write_votes(tmp_path / "t3", part, 3, shards=[1, 2, 0], batch_rows=1)
    targets = [target((f"t{number}", [root])) for number, root in enumerate((first, second, third), 1)]
    joined = JoinedCorpus.open([part.source], targets, LABELS)
    rows = np.random.default_rng(0).permutation(NUM_ROWS)
    for start in range(0, NUM_ROWS, 5):
        taken = rows[start : start + 5]
        expected_BNC = np.stack([votes(teacher, taken) for teacher in (1, 2, 3)], axis=1)
        assert np.array_equal(joined.gather(taken).logits_BNC, expected_BNC)


def test_a_store_whose_rows_were_shuffled_is_refused_under_records_that_claim_the_plans_order(
    part: MadePart, tmp_path: Path
) -> None:
    def make_shuffled(rows: np.ndarray) -> pa.RecordBatch:
        shuffled = np.random.default_rng(len(rows)).permutation(rows)
        keys = take_keys(part.plan, shuffled)
        # Ordinals as if nothing had happened: the ids and hashes alone can tell.
        ordinals = take_keys(part.plan, rows).column("ordinal")
        schema = classification_schema(3)
        logits = pa.FixedSizeListArray.from_arrays(
            pa.array(votes(1, shuffled).ravel()), type=schema.field("logits").type
        )
        return pa.RecordBatch.from_arrays([ordinals, *keys.columns[1:], logits], schema=schema)

    root = write_store(tmp_path / "t1", part.plan, identity_of(part, "t1"), make_shuffled)
    with pytest.raises(DamagedStoreError):
        JoinedCorpus.open([part.source], [target(("t1", [root]))], LABELS).gather(np.arange(NUM_ROWS))


def test_large_logits_of_a_student_reach_the_loss_that_one_softmax_gives(tmp_path: Path) -> None:
    init = config_init(save_tokenizer(tmp_path), "bert")
    student = MultiHeadStudent.from_init(init, (GOLDEN_HEAD, "t"), LABELS[:2], 3, max_length=32).eval()
    with torch.no_grad():
        student.bank.weight.zero_()
        student.bank.bias.copy_(torch.tensor([0.0, 40.0, 30.0, -10.0]))
        inputs = student.tokenizer(*map(list, zip(*TEXTS[:1], strict=True)), return_tensors="pt")
        logits_BHC = student(**inputs)
    objective = Objective(uses_golden=True, num_soft=1, alpha=0.5, soft_loss="mse", temperature=1.0)
    teacher_BNC = torch.tensor([[[28.0, -14.0]]])
    losses = objective.sum_losses(logits_BHC, torch.tensor([0]), teacher_BNC, torch.ones(1))
    # Sure of the wrong label by 40: -log softmax = 40. Of two softmaxes it would be log(1 + e) = 1.31.
    assert losses.golden.item() == pytest.approx(40.0)
    # (2^2 + 4^2) / 2 on raw logits. Of probabilities it would be 0.
    assert losses.soft.item() == pytest.approx(10.0)
    assert losses.total.item() == pytest.approx(25.0)


def test_the_gradient_of_the_golden_loss_is_probability_less_one_hot() -> None:
    logits_BC = torch.tensor([[math.log(6.0), math.log(3.0), 0.0]], dtype=torch.float64, requires_grad=True)
    golden_loss(logits_BC, torch.tensor([1])).sum().backward()
    expected_BC = torch.tensor([[0.6, 0.3 - 1.0, 0.1]], dtype=torch.float64)
    assert logits_BC.grad is not None
    torch.testing.assert_close(logits_BC.grad, expected_BC)


def test_many_to_one_and_one_average_have_other_losses_where_teachers_disagree(
    part: MadePart, tmp_path: Path
) -> None:
    one, two = np.tile([3.0, 0.0, 0.0], (NUM_ROWS, 1)), np.tile([-3.0, 0.0, 6.0], (NUM_ROWS, 1))
    stores = [
        (name, [make_store(tmp_path / name, part.plan, logits.astype(np.float32), teacher=name)])
        for name, logits in (("t1", one), ("t2", two))
    ]
    many = JoinedCorpus.open([part.source], [target(store) for store in stores], LABELS)
    average = JoinedCorpus.open([part.source], [target(*stores, head=AVERAGE_HEAD)], LABELS)
    rows = np.arange(4)
    # A student that says 0: head 1 is off by 3^2 / 3 = 3, head 2 by (3^2 + 6^2) / 3 = 15, mean 9.
    assert soft_loss(many, torch.zeros(4, 2, 3), rows) == pytest.approx(9.0)
    # The mean teacher is (0, 0, 3): 3^2 / 3 = 3.
    assert soft_loss(average, torch.zeros(4, 1, 3), rows) == pytest.approx(3.0)
    # A student that equals the mean has nothing to learn from it, but much from each teacher:
    # (3^2 + 3^2) / 3 = 6 from either.
    mean_BNC = torch.tensor([0.0, 0.0, 3.0]).expand(4, 1, 3)
    assert soft_loss(average, mean_BNC, rows) == 0.0
    assert soft_loss(many, mean_BNC.expand(4, 2, 3), rows) == pytest.approx(6.0)


def test_a_batch_without_the_last_label_is_as_wide_as_the_tasks_label_names(
    part: MadePart, tmp_path: Path
) -> None:
    root = write_votes(tmp_path / "t1", part, 1, shards=[0, 1, 2], batch_rows=4)
    joined = JoinedCorpus.open([part.source], [target(("t1", [root]))], LABELS)
    found = joined.gather(np.array([0, 2, 4]))
    assert found.labels.tolist() == [0, 0, 0]
    assert found.logits_BNC.shape == (3, 1, 3)
    init = config_init(save_tokenizer(tmp_path / "tokenizer"), "bert")
    student = MultiHeadStudent.from_init(init, (GOLDEN_HEAD, "t1"), LABELS, 3, max_length=32)
    assert student.bank.weight.shape[0] == 2 * 3
    # A student that knows nothing of three labels: log 3, not log 1.
    loss_B = golden_loss(torch.zeros(3, 3), torch.from_numpy(found.labels))
    torch.testing.assert_close(loss_B, torch.full((3,), math.log(3.0)))

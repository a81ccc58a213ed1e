"""Errors cross process boundaries whole."""

import pickle

import pytest

from schemas.errors import (
    CorpusError,
    DamagedStoreError,
    IncompleteStoreError,
    InterruptedRunError,
    LabelError,
    RecipeError,
    RefusedError,
    ResourceError,
    TeacherError,
    TmkdError,
    TrainingError,
)

ERRORS = [
    RecipeError("unknown key", source="a.yaml", field="x.y"),
    CorpusError("null text", corpus="rte", part="train"),
    DamagedStoreError("hash differs", store="/s", shard=1, batch=2, offset=3),
    IncompleteStoreError("/s"),
    LabelError("no map", unmapped=["LABEL_0"]),
    RefusedError("another store", differing=["dtype: float32 -> bfloat16"]),
    TeacherError("not finite", teacher="t", shard=4, example_ids=["train/1"]),
    ResourceError("disk full"),
    TrainingError("failed", log="/l"),
    InterruptedRunError("stopped", signal_number=15),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_keeps_class_message_and_data_when_it_is_pickled(error: TmkdError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.exit_code == error.exit_code

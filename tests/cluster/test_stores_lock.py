from cluster.stores_lock import keep_stores
from schemas.records import LockedPart, StoresLock


def lock(plan: str, **stores: str) -> StoresLock:
    part = LockedPart(
        part="p", fingerprint="f" * 64, plan_hash=plan * 64, num_rows=9, rows="/r", stores=stores
    )
    return StoresLock(corpora={"train": (part,)})


def test_stores_of_teachers_that_were_not_asked_for_this_time_are_kept() -> None:
    kept = keep_stores(lock("a", t2="/new"), lock("a", t1="/old", t2="/older"))
    assert kept == lock("a", t1="/old", t2="/new")


def test_stores_of_another_plan_are_not_kept() -> None:
    assert keep_stores(lock("b", t2="/new"), lock("a", t1="/old")) == lock("b", t2="/new")

"""How many optimizer steps a stage takes, known before it runs.

Invariant: it is what the trainer logs as ``total_steps`` (tests/cluster/test_step_count.py).
"""

from __future__ import annotations

from schemas.job import StageJob


def count_steps(job: StageJob) -> int:
    """Counts the optimizer steps of a classifier's stage, early stopping left out.

    Args:
        job: Its corpus and stores are there.

    Raises:
        DataError: A store or the corpus is damaged, or no row is left.
    """
    from distill.join import JoinedCorpus
    from distill.order import hold_out, select_rows

    training = job.training
    if training.max_steps is not None:
        return training.max_steps
    joined = JoinedCorpus.open_job(job)
    chosen = select_rows(joined.usable_rows(labelled=job.uses_golden), training.rows)
    rows, _ = hold_out(chosen, training.selection_fraction, job.selection_seed, joined.corpus_key)
    return training.epochs * -(-len(rows) // training.global_batch)

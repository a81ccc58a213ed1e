"""From corpora and logit stores to a student. Never imports ``precompute``, never opens a teacher."""

"""From corpora and teachers to logit stores."""

"""Keep policies: which entries of a teacher's distribution a store keeps."""

from __future__ import annotations

from typing import Literal

from schemas.fields import Frozen


class DensePolicy(Frozen):
    """Keeps every logit, raw; the only policy for classification."""

    kind: Literal["dense"] = "dense"


KeepPolicy = DensePolicy

"""Keep policies: which entries of a teacher's distribution a store keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class DensePolicy(BaseModel):
    """Keeps every logit, raw; the only policy for classification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dense"] = "dense"


KeepPolicy = DensePolicy

"""Base class and field types of the recipe's models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _check_gpus(num_gpus: float) -> float:
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise ValueError("is a share of one GPU, or a whole number of them")
    return num_gpus


# Beside the runs of an output root.
_SHARED_DIRECTORIES = ("cache", "corpora", "stores", "students", "teachers")


def _check_run_name(name: str) -> str:
    if name in _SHARED_DIRECTORIES:
        raise ValueError(f"is the name of a directory that all runs share: {', '.join(_SHARED_DIRECTORIES)}")
    return name


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
RunName = Annotated[Name, AfterValidator(_check_run_name)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Gpus = Annotated[float, Field(ge=0), AfterValidator(_check_gpus)]
Arm = Literal["golden", "golden-long", "1-o-1", "1avg-o-1", "m-o-m", "m-o-1", "tkd", "tmkd"]


class Frozen(BaseModel):
    """Base of all recipe models: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

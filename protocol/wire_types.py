"""What every JSON body of the protocol is made of: the base model and the bounded field types."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

U32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=0, le=2**53)]  # what JSON readers hold exactly
Name = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(max_length=4096)]
Seconds = Annotated[float, Field(ge=0)]


class Message(BaseModel):
    """Base of all control bodies."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

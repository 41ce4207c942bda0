"""The parts of OpenAI's request bodies beside the messages: tools and formats of the answer. Closed: a field
that is not honoured is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from isthmus.edge.requests import Grammar

MAX_TOOLS = 128


class Closed(BaseModel):
    """A part of a request body."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _strictly_json(value: dict[str, Any]) -> dict[str, Any]:
    """NaN and Infinity are read by many JSON parsers, and are no JSON."""
    json.dumps(value, allow_nan=False)
    return value


def _of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    """Arguments have names."""
    if schema.get("type", "object") != "object":
        raise ValueError(f'the schema is of type {schema["type"]!r}, arguments are of type "object"')
    return {"type": "object", **schema}


JsonObject = Annotated[dict[str, Any], AfterValidator(_strictly_json)]
Schema = JsonObject
Parameters = Annotated[Schema, AfterValidator(_of_an_object)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


# ---- the answer's format -----------------------------------------------------------------------------


class TextFormat(Closed):
    """Any text."""

    type: Literal["text"]

    def grammar(self) -> Grammar | None:
        """What the answer must match; None: anything."""
        return None


class JsonObjectFormat(Closed):
    """A JSON object of any form."""

    type: Literal["json_object"]

    def grammar(self) -> Grammar | None:
        """What the answer must match."""
        return Grammar("json_object")


class JsonSchema(Closed):
    """A schema with its name. `strict` changes nothing: the answer is held to the schema in any case."""

    name: Name
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Closed):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def grammar(self) -> Grammar | None:
        """What the answer must match."""
        return Grammar("json_schema", json.dumps(self.json_schema.schema_, ensure_ascii=False))


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


# ---- tools -------------------------------------------------------------------------------------------


class Function(Closed):
    """A function that the model may call. Without `parameters` it takes none; `strict` changes nothing:
    arguments are held to the schema in any case."""

    name: Name
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class Tool(Closed):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates want it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        function["parameters"] = nothing if self.function.parameters is None else self.function.parameters
        return {"type": "function", "function": function}


class ChosenFunction(Closed):
    """The name of one of the tools."""

    name: Name


class ChosenTool(Closed):
    """The one tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | ChosenTool

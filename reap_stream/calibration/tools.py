"""Tools and tool calls in the one form that chat templates take.

Sets spell them in many ways: as JSON in a string, bare or wrapped, with parameters as a JSON schema
or as a table of Python types. Templates want objects: ``{"type": "function", "function": {...}}``,
and a call's arguments as an object too, since those that print JSON would quote a string again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from reap_stream.errors import CalibrationError

_TYPES: Final = {
    "str": "string", "string": "string", "text": "string",
    "int": "integer", "integer": "integer",
    "float": "number", "number": "number", "double": "number",
    "bool": "boolean", "boolean": "boolean",
    "list": "array", "array": "array", "tuple": "array", "set": "array",
    "dict": "object", "object": "object",
}  # fmt: skip
_TYPE: Final = re.compile(r"\s*(?P<outer>\w+)\s*(?:\[(?P<inner>.*)\])?\s*")
_OPTIONAL: Final = re.compile(r",\s*optional\b.*|,\s*default\b.*", re.IGNORECASE)


def parse_json(text: str, where: str) -> Any:
    """Read JSON that a record holds as text.

    Raises:
        CalibrationError: it is none; the place is named.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: is text and no JSON: {error}") from error


def objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a list of objects, which may be JSON in a string; one object is a list of one.

    Raises:
        CalibrationError: it is something else.
    """
    if isinstance(value, str):
        value = parse_json(value, where) if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise CalibrationError(f"{where} must be a list, not {type(value).__name__}")
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise CalibrationError(
                f"{where}[{number}] must be an object, not {type(item).__name__}"
            )
    return value


def normalise_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the tools a template may list, None if there are none.

    Args:
        value: a list of tools, or JSON of one; each bare or wrapped, its parameters a JSON schema
            or ``{name: {"type": "str, optional", "description": …}}``.
        where: the place, for the message.

    Raises:
        CalibrationError: no list of objects, or one without a name.
    """
    tools = [_tool(tool, f"{where}[{number}]") for number, tool in enumerate(objects(value, where))]
    return tools or None


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        found = ", ".join(sorted(map(str, tool))) or "none"
        raise CalibrationError(f"{where} has fields {found}: a tool needs a name")
    if function is tool:
        function = {key: value for key, value in tool.items() if key != "type"}
    if "parameters" not in function and "input_schema" in function:
        function = {
            "parameters" if key == "input_schema" else key: value for key, value in function.items()
        }
    parameters = function.get("parameters")
    if isinstance(parameters, dict) and not _is_schema(parameters):
        function = {**function, "parameters": _schema(parameters)}
    return {"type": "function", "function": function}


def _is_schema(parameters: Mapping[str, Any]) -> bool:
    # A parameter may itself be called "type" or "properties": then an object describes it.
    properties = parameters.get("properties")
    if isinstance(properties, dict) and not isinstance(properties.get("type"), str):
        return True
    return not all(isinstance(value, dict) for value in parameters.values())


def _schema(parameters: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    properties, required = {}, []
    for name, about in parameters.items():
        spelled = about.get("type")
        if isinstance(spelled, str):
            properties[name] = {**about, **_json_type(spelled)}
        else:
            properties[name] = about
        optional = isinstance(spelled, str) and "optional" in spelled.lower()
        if not optional and "default" not in about:
            required.append(name)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return {**schema, "required": required} if required else schema


def _json_type(spelled: str) -> dict[str, Any]:
    """JSON schema of a Python type's name, as far as it says one."""
    match = _TYPE.fullmatch(_OPTIONAL.sub("", spelled))
    if match is None:
        return {"type": spelled}
    outer, inner = match["outer"].lower(), match["inner"]
    if outer == "optional" and inner:
        return _json_type(inner)
    named = _TYPES.get(outer)
    if named == "array" and inner and outer != "tuple":
        return {"type": named, "items": _json_type(inner)}
    return {"type": named or spelled}


def normalise_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return an assistant's tool calls.

    Args:
        value: a list of calls, or JSON of one; each bare or wrapped, its arguments an object or
            JSON of one.
        where: the place, for the message.

    Raises:
        CalibrationError: no list of objects, or one without a name.
    """
    return [_call(call, f"{where}[{number}]") for number, call in enumerate(objects(value, where))]


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if isinstance(function, str):
        function = {**call, "name": function}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        found = ", ".join(sorted(map(str, call))) or "none"
        raise CalibrationError(f"{where} has fields {found}: a tool call needs a name")
    arguments = function.get("arguments", function.get("parameters"))
    result: dict[str, Any] = {"type": "function"}
    if isinstance(call.get("id"), str):
        result["id"] = call["id"]
    result["function"] = {"name": function["name"], "arguments": _arguments(arguments)}
    return result


def _arguments(value: Any) -> Any:
    """Return arguments as an object; text that holds none stays text, as the model wrote it."""
    if value is None or value == "":
        return {}
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value

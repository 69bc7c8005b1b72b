"""Lines of a gateway's log as training rows: {"request": ..., "response": ...} of the OpenAI API, one exchange a line.

A request is the body of a chat or text completion. A response is its body, or of a stream the list of its chunks, or
their text as it was sent ("data: {...}" lines). What is no answer of the target to learn from is left out, and counted
by its reason. Where vLLM was asked for token ids (`return_token_ids`), they are used as they are.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

from vllm_steer.common.errors import SteeringError

KEYS = {"request", "response"}


class NotAnswered(SteeringError):
    """An exchange that is right as it is, but nothing to train on; the text is the reason it is counted under."""


def is_exchange(raw: dict[str, Any]) -> bool:
    """Whether a line is one of a gateway's log."""
    return raw.keys() >= KEYS and isinstance(raw["request"], dict)


def row(raw: dict[str, Any], model: str | None) -> dict[str, Any]:
    """A line in the form of a response file: {"prompt", "response"}, maybe "tools" and "template", or ids.

    `model` is the name the target was served under; None: whatever the log names. Raises NotAnswered for what is left
    out, SteeringError for what is no exchange.
    """
    request, response = raw["request"], _body(raw["response"])
    if response.get("error") or response.get("object") == "error":
        raise NotAnswered("errors")
    served = response.get("model") or request.get("model")
    if model is not None and served != model:
        raise NotAnswered("answers of other models")
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(each, dict) for each in choices):
        raise SteeringError(f"the response has no choices: {reprlib.repr(sorted(response))}")
    if len(choices) > 1:
        raise NotAnswered("several choices")
    choice = choices[0]
    message = choice.get("message") or {}
    if message.get("tool_calls") or message.get("function_call"):
        raise NotAnswered("tool calls")
    if message.get("reasoning_content") or message.get("reasoning"):
        raise NotAnswered("answers with their reasoning apart")
    prompt_ids, ids = response.get("prompt_token_ids") or choice.get("prompt_token_ids"), choice.get("token_ids")
    if prompt_ids and ids:
        return {"prompt_ids": prompt_ids, "response_ids": ids}
    text = message.get("content") if message else choice.get("text")
    if not text:
        raise NotAnswered("empty answers")
    if request.get("echo"):
        raise NotAnswered("answers that repeat their prompt (echo)")
    found = {"prompt": request.get("messages", request.get("prompt")), "response": text}
    found |= {"tools": request["tools"]} if request.get("tools") else {}
    return found | {"template": request.get("chat_template_kwargs") or {}}


def _body(response: Any) -> dict[str, Any]:
    """The response as one body, whichever way it was logged."""
    if isinstance(response, str):
        response = _events(response)
    if isinstance(response, list):
        return _joined(response)
    if not isinstance(response, dict):
        raise SteeringError(
            f"the response is a {type(response).__name__}, allowed is a body, or the chunks of a stream"
        )
    return response


def _events(text: str) -> list[Any]:
    lines = (line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:"))
    try:
        return [json.loads(line) for line in lines if line and line != "[DONE]"]
    except ValueError as error:
        raise SteeringError(f"the streamed response is not JSON in its data lines ({error})") from None


def _joined(chunks: list[Any]) -> dict[str, Any]:
    """One body of a stream's chunks."""
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise SteeringError("the streamed response has no chunks, or some that are no objects")
    whole: dict[str, Any] = {"model": next((c["model"] for c in chunks if c.get("model")), None)}
    parts: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        whole |= {key: chunk[key] for key in ("error", "prompt_token_ids") if chunk.get(key)}
        for choice in chunk.get("choices") or []:
            _add(parts.setdefault(choice.get("index", 0), {"message": {}, "token_ids": []}), choice)
    if not parts and "error" not in whole:
        raise SteeringError("the streamed response has no choices")
    return whole | {"choices": [_finished(part) for _, part in sorted(parts.items())]}


def _add(part: dict[str, Any], choice: dict[str, Any]) -> None:
    delta, message = choice.get("delta"), part["message"]
    if delta is None:
        part["text"] = part.get("text", "") + (choice.get("text") or "")
    else:
        message["content"] = message.get("content", "") + (delta.get("content") or "")
        message |= {
            k: delta[k] for k in ("tool_calls", "function_call", "reasoning_content", "reasoning") if delta.get(k)
        }
    part["token_ids"] += choice.get("token_ids") or []
    part |= {"prompt_token_ids": choice["prompt_token_ids"]} if choice.get("prompt_token_ids") else {}


def _finished(part: dict[str, Any]) -> dict[str, Any]:
    """Without the keys of the other kind of completion."""
    return {key: value for key, value in part.items() if value}

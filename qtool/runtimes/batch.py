"""OpenAI's batch files: their lines as prompts, and answers in the shapes of that API."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from qtool.errors import InputError
from qtool.runtimes.lines import NO_MESSAGES, NO_PROMPT, Chat, Line, is_conversation, is_prompt

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"


def line(fields: dict[str, Any], chat: Chat) -> Line:
    """A line of a batch file: custom_id, method, url, body. What the body says of sampling is this line's own."""
    url, body = fields.get("url"), fields["body"]
    try:
        if fields.get("method", "POST") != "POST" or url not in (CHAT_URL, COMPLETIONS_URL):
            raise InputError(f"{fields.get('method')} {url} is not POST {CHAT_URL} or {COMPLETIONS_URL}")
        if not isinstance(body, dict):
            raise InputError("body is not a JSON object")
        request = _body(body, url, chat)
    except InputError as error:
        request = {"error": error.what}
    return Line(fields, request, url if url in (CHAT_URL, COMPLETIONS_URL) else CHAT_URL)


def _body(body: Mapping[str, Any], url: str, chat: Chat) -> dict[str, Any]:
    if url == CHAT_URL:
        if not is_conversation(body.get("messages")):
            raise InputError(NO_MESSAGES)
        request = chat.conversation(body["messages"])
    else:
        if not is_prompt(body.get("prompt")):
            raise InputError(NO_PROMPT)
        request = {"prompt": body["prompt"]}
    if body.get("tools"):
        raise InputError("tools are not supported")
    if (extra := body.get("chat_template_kwargs")) is not None:
        if not isinstance(extra, dict):
            raise InputError("chat_template_kwargs is not a JSON object")
        request["chat_template_kwargs"] = extra
    return request | {"sampling": _sampling(body, url)}


def _sampling(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """What a request body says of sampling, by vLLM's names; keys that say nothing of it are left alone."""
    from qtool.recipe.schema import Sampling
    from qtool.runtimes.sampling import validated

    given = {name: body[name] for name in Sampling.model_fields if body.get(name) is not None}
    if (most := body.get("max_completion_tokens")) is not None:
        given["max_tokens"] = most
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if url == CHAT_URL and "logprobs" in given:
        given["logprobs"] = body.get("top_logprobs", 0) if given["logprobs"] is True else None
    given |= _structure(body.get("response_format"))
    return validated({name: value for name, value in given.items() if value is not None})


def _structure(wanted: Any) -> dict[str, Any]:
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"structured_outputs": {"json_object": True}}
    if kind == "json_schema" and isinstance(schema := wanted.get("json_schema"), dict) and "schema" in schema:
        return {"structured_outputs": {"json": schema["schema"]}}
    raise InputError(f"response_format {str(wanted)[:100]} is not supported")


def record(line: Line, item: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a line of a batch file, in the shape of a batch's output."""
    number = f"{item['index']:08}"
    if "error" in item:
        error = {"message": item["error"], "type": "invalid_request_error", "param": None, "code": None}
        status, body = 400, {"error": error}
    else:
        status, body = 200, _completion(line, item, number)
    response = {"status_code": status, "request_id": f"req_{number}", "body": body}
    return {
        "id": f"batch_req_{number}",
        "custom_id": line.fields["custom_id"],
        "response": response,
        "error": None if status == 200 else {"code": "invalid_request", "message": item["error"]},
    }


def _completion(line: Line, item: Mapping[str, Any], number: str) -> dict[str, Any]:
    chat = line.url == CHAT_URL
    made = sum(choice["completion_tokens"] for choice in item["choices"])
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": line.fields["body"].get("model", ""),
        "choices": [_choice(i, choice, chat) for i, choice in enumerate(item["choices"])],
        "usage": {
            "prompt_tokens": item["prompt_tokens"],
            "completion_tokens": made,
            "total_tokens": item["prompt_tokens"] + made,
        },
    }


def _choice(index: int, choice: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    places = choice.get("logprobs")
    shown: dict[str, Any] = {"index": index}
    if chat:
        shown["message"] = {"role": "assistant", "content": choice["text"]}
        if choice.get("reasoning") is not None:
            shown["message"]["reasoning"] = choice["reasoning"]
        shown["logprobs"] = None if places is None else {"content": places}
    else:
        shown["text"] = choice["text"]
        shown["logprobs"] = None if places is None else _legacy(places)
    shown["finish_reason"] = choice["finish_reason"]
    return shown


def _legacy(places: list[dict[str, Any]]) -> dict[str, Any]:
    """Log-probabilities as completions that are no chat have them."""
    offsets, end = [], 0
    for place in places:
        offsets.append(end)
        end += len(place["token"])
    return {
        "tokens": [place["token"] for place in places],
        "token_logprobs": [place["logprob"] for place in places],
        "top_logprobs": [{top["token"]: top["logprob"] for top in place["top_logprobs"]} for place in places],
        "text_offset": offsets,
    }

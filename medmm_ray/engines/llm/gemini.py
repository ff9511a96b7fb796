"""Gemini: one attempt at one request, texts and pictures in, its text and token counts out.

By plain REST, or by the package google-generativeai, which is imported in the constructor: the same requests, and the
same replies. The key comes from an environment variable and travels in a header. The package's REST transport is
synchronous, so that its requests run in threads, at most `in_flight` at a time; its own retries are off.
"""

import asyncio
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from medmm_ray.engines.llm.endpoint import (
    ChatChoice,
    ChatImage,
    ChatReply,
    ChatRequest,
    Endpoint,
    EndpointError,
    RetryableError,
    Turn,
    stated,
    token_count,
)
from medmm_ray.engines.llm.faults import (
    REFUSED,
    ServerError,
    error_inside,
    fault_of,
    http_error,
    refused_field,
    retry_after_seconds,
)
from medmm_ray.engines.llm.http import HttpClient, entry, or_empty

ADDRESS = "https://generativelanguage.googleapis.com"
TIER = "x-gemini-service-tier"  # the header by which all of Google's addresses state it


def gemini_endpoint(
    model: str,
    client: str | None = None,
    *,
    address: str | None = None,
    key_variable: str = "GEMINI_API_KEY",
    timeout_s: float = 120.0,
    in_flight: int = 16,
) -> Endpoint:
    """One model by `client`, rest or sdk; None: sdk where its package is installed."""
    if client == "sdk" or (client is None and sdk_is_installed()):
        return GeminiSdkEndpoint(
            model, address=address, key_variable=key_variable, timeout_s=timeout_s, in_flight=in_flight
        )
    return GeminiEndpoint(model, address=address, key_variable=key_variable, timeout_s=timeout_s)


def sdk_is_installed() -> bool:
    """Whether google-generativeai is there."""
    try:
        return importlib.util.find_spec("google.generativeai") is not None
    except ModuleNotFoundError:  # not even the namespace google
        return False


class GeminiEndpoint:
    """One model by REST; `address` is another one of the API, e.g. a proxy."""

    def __init__(
        self, model: str, *, address: str | None = None, key_variable: str = "GEMINI_API_KEY", timeout_s: float = 120.0
    ) -> None:
        self.identity = f"gemini:{model}"
        self._model, self._check = model, f"{key_variable} and the model's name"
        path = model if "/" in model else f"models/{model}"
        self._url = f"{(address or ADDRESS).rstrip('/')}/v1beta/{path}:generateContent"
        self._headers = {"x-goog-api-key": key_of(model, key_variable), "Content-Type": "application/json"}
        self._http = HttpClient(timeout_s)

    async def send(self, request: ChatRequest) -> ChatReply:
        """One attempt; the faults of `endpoint`."""
        content = json.dumps(body_of(request, self._model)).encode()
        answer = await self._http.post(self._url, content, self._headers)
        if answer.status >= 400:
            error = http_error(answer.status, answer.content)
            raise gemini_fault(self._model, error, request, answer.wait_s, self._check)
        try:
            body = json.loads(answer.content)
            error_in_200 = error_inside(body, answers="candidates")
            if error_in_200 is None:
                reply = reply_of(body, request, self._model)
                return replace(reply, tier=reply.tier or stated(answer.headers.get(TIER)))
        except (ValueError, RecursionError) as error:
            message = f"a garbled answer of {len(answer.content)} bytes ({answer.content_type}): {error}"
            raise RetryableError(message, maybe_paid=True) from None
        raise gemini_fault(self._model, error_in_200, request, answer.wait_s, self._check)


class GeminiSdkEndpoint:
    """One model by google-generativeai; `address` is another one of the API, e.g. a proxy."""

    def __init__(
        self,
        model: str,
        *,
        address: str | None = None,
        key_variable: str = "GEMINI_API_KEY",
        timeout_s: float = 120.0,
        in_flight: int = 16,
    ) -> None:
        key = key_of(model, key_variable)
        try:
            import google.generativeai as client
        except ImportError as error:
            raise EndpointError(
                "gemini_client=sdk needs the package google-generativeai, which is missing; pip install "
                "'medmm-ray[gemini]', or set gemini_client=rest, which needs nothing"
            ) from error
        client.configure(api_key=key, transport="rest", client_options={"api_endpoint": address} if address else None)
        self.identity = f"gemini:{model}"
        self._library, self._model, self._timeout_s = client, model, timeout_s
        self._check = f"{key_variable} and the model's name"
        self._models: dict[str, Any] = {}
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="gemini")

    async def send(self, request: ChatRequest) -> ChatReply:
        """One attempt; the faults of `endpoint`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._send, request)

    def _send(self, request: ChatRequest) -> ChatReply:
        from google.api_core import exceptions
        from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
        from requests import RequestException, Timeout

        contents = []
        for turn in sent_turns(request):
            contents.append({"role": turn.role, "parts": [_sdk_part(part) for part in turn.parts]})
        try:
            response = self._client_for(request.system).generate_content(
                contents,
                generation_config=_sdk_config(request),
                request_options={"timeout": self._timeout_s, "retry": None},
            )
        except exceptions.GoogleAPICallError as error:
            raise self._fault(error, request) from None
        except Timeout:
            raise RetryableError(f"no answer within {self._timeout_s:g} s", maybe_paid=True) from None
        except (RequestException, ParseError) as error:
            raise RetryableError(f"{type(error).__name__}: {error}"[:200], maybe_paid=True) from None
        message = response._result  # its own to_dict names things otherwise than the API
        body = type(message).to_dict(
            message,
            use_integers_for_enums=False,
            preserving_proto_field_name=False,
            including_default_value_fields=False,
        )
        try:
            return reply_of(body, request, self._model)
        except ValueError as error:
            raise RetryableError(f"a garbled answer: {error}", maybe_paid=True) from None

    def _fault(self, error: Any, request: ChatRequest) -> Exception:
        """The fault that an error of the package means."""
        content, wait_s = b"", None
        if error.response is not None:
            content = error.response.content
            wait_s = retry_after_seconds(error.response.headers.get("Retry-After"), error.response.text)
        server_error = http_error(int(error.code or 500), content or str(error.message).encode())
        return gemini_fault(self._model, server_error, request, wait_s, self._check)

    def _client_for(self, system: str) -> Any:
        """The library's client for a system instruction."""
        if system not in self._models:
            self._models[system] = self._library.GenerativeModel(self._model, system_instruction=system or None)
        return self._models[system]


def key_of(model: str, variable: str) -> str:
    """The key in an environment variable; raises `EndpointError` where it is not set."""
    key = os.environ.get(variable)
    if not key:
        raise EndpointError(f"{model} needs a Gemini key in the environment variable {variable}; it is not set")
    return key


def gemini_fault(model: str, error: ServerError, request: ChatRequest, wait_s: float | None, check: str) -> Exception:
    """The fault that an error means; `EndpointError` where the model takes no such sampling as is set."""
    field = refused_field(error, ("temperature", "topP"))
    if field is None:
        return fault_of(model, error, wait_s, check)
    setting, value = ("temperature", request.temperature) if field == "temperature" else ("top_p", request.top_p)
    return EndpointError(
        f"{model} takes no {setting}={value}; set {setting} to null (the model's own) in the section that names it. It "
        f"says: {error.words[:200]}"
    )


# Requests


def sent_turns(request: ChatRequest) -> Iterator[Turn]:
    """The turns without empty texts, which the API does not take; a turn that has no other part is left out."""
    for turn in request.turns:
        parts = tuple(part for part in turn.parts if not isinstance(part, str) or part.strip())
        if parts:
            yield Turn(turn.role, parts)


def body_of(request: ChatRequest, model: str) -> dict[str, Any]:
    """A request in the API's JSON."""
    config: dict[str, Any] = {
        "maxOutputTokens": request.max_tokens,
        "temperature": request.temperature,
        "topP": top_p_of(request),
    }
    if request.n > 1:
        config["candidateCount"] = request.n
    if request.schema is not None:
        config["responseMimeType"] = "application/json"
        config["responseSchema"] = gemini_schema(request.schema)
    if request.reasoning_effort is not None:
        config["thinkingConfig"] = thinking_config(request.reasoning_effort, model)
    contents = []
    for turn in sent_turns(request):
        contents.append({"role": turn.role, "parts": [_part(part) for part in turn.parts]})
    body: dict[str, Any] = {"contents": contents, "generationConfig": _without_none(config)}
    if request.system:
        body["systemInstruction"] = {"parts": [{"text": request.system}]}
    if request.tier is not None:
        body["service_tier"] = request.tier
    return body


def _without_none(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}


# Tokens of thoughts, as Google's OpenAI-compatible address maps the same words for the models before Gemini 3.
_BUDGETS = {"none": 0, "minimal": 1_024, "low": 1_024, "medium": 8_192, "high": 24_576}


def thinking_config(effort: str, model: str) -> dict[str, Any]:
    """How much a model may think: Gemini 2.5 takes a budget of tokens, those after it a level, of which none is off."""
    if model.rpartition("/")[2].startswith("gemini-2"):
        return {"thinkingBudget": _BUDGETS[effort]}
    return {"thinkingLevel": "minimal" if effort == "none" else effort}


def top_p_of(request: ChatRequest) -> float | None:
    """The top_p to send; None leaves it out, where the model's own is to be taken."""
    return None if request.temperature is None and request.top_p == 1.0 else request.top_p


def _part(part: str | ChatImage) -> dict[str, Any]:
    if isinstance(part, str):
        return {"text": part}
    return {"inlineData": {"mimeType": "image/png", "data": part.base64_png}}


def _sdk_part(part: str | ChatImage) -> str | dict[str, Any]:
    if isinstance(part, str):
        return part
    return {"mime_type": "image/png", "data": part.png}


def _sdk_config(request: ChatRequest) -> dict[str, Any]:
    config: dict[str, Any] = {
        "max_output_tokens": request.max_tokens,
        "candidate_count": request.n,
        "temperature": request.temperature,
        "top_p": top_p_of(request),
    }
    if request.schema is not None:
        config["response_mime_type"] = "application/json"
        config["response_schema"] = gemini_schema(request.schema, _SDK_NAMES)
    return _without_none(config)


_SCHEMA_WORDS = ("type", "enum", "required", "description", "minItems", "maxItems")
_SDK_NAMES = {"minItems": "min_items", "maxItems": "max_items"}


def gemini_schema(schema: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A JSON schema in the subset that this API takes, with other `names` for its words where there are such."""
    names = names or {}
    converted = {names.get(word, word): value for word, value in schema.items() if word in _SCHEMA_WORDS}
    converted["type"] = str(schema["type"]).upper()
    if "items" in schema:
        converted["items"] = gemini_schema(schema["items"], names)
    if "properties" in schema:
        properties = schema["properties"]
        converted["properties"] = {name: gemini_schema(inner, names) for name, inner in properties.items()}
    return converted


# Answers


def reply_of(body: Any, request: ChatRequest, model: str) -> ChatReply:
    """The API's JSON as a `ChatReply`; where no prompt's tokens are counted, all that is possible counts as used.

    Raises `ValueError` where it is no answer, `RetryableError` where it is one without content.
    """
    content = entry(body, "the body")
    usage = or_empty(content.get("usageMetadata"))
    prompt_tokens = token_count(usage.get("promptTokenCount"), 0)
    answered_by = stated(content.get("modelVersion"))
    candidates = content.get("candidates") or []
    if not isinstance(candidates, list):
        raise ValueError("candidates is no list")
    if not candidates:
        reason = or_empty(content.get("promptFeedback")).get("blockReason")
        if not reason:
            billed = ChatReply((), prompt_tokens, 0, 0) if prompt_tokens else None
            raise RetryableError("an answer without content", maybe_paid=billed is None, billed=billed)
        return ChatReply((), prompt_tokens, 0, 0, f"{model} blocked the prompt ({reason})", answered_by)
    choices, refusal = [], None
    for value in candidates:
        candidate = entry(value, "a candidate")
        reason = str(candidate.get("finishReason"))
        if reason in REFUSED:
            refusal = f"{model} did not answer ({reason})"
        choices.append(_choice(candidate, reason))
    return ChatReply(
        choices=tuple(choices),
        prompt_tokens=prompt_tokens or request.text_bytes,
        cached_tokens=min(prompt_tokens, token_count(usage.get("cachedContentTokenCount"), 0)),
        completion_tokens=_completion_tokens(usage, prompt_tokens) if prompt_tokens else request.n * request.max_tokens,
        refusal=refusal,
        model=answered_by,
        tier=stated(usage.get("serviceTier")),
    )


def _completion_tokens(usage: dict[str, Any], prompt_tokens: int) -> int:
    """Tokens that are billed as output: thoughts are, and the total has them where they are not counted apart."""
    answer = token_count(usage.get("candidatesTokenCount"), 0)
    thoughts = token_count(usage.get("thoughtsTokenCount"), 0)
    total = token_count(usage.get("totalTokenCount"), 0)
    return max(answer + thoughts, total - prompt_tokens)


def _choice(candidate: dict[str, Any], reason: str) -> ChatChoice:
    """A candidate's text; one that spent all on thoughts, or said nothing, has no part, or no content."""
    parts = or_empty(candidate.get("content")).get("parts") or []
    if not isinstance(parts, list):
        raise ValueError("a candidate's parts are no list")
    texts, thoughts = [], 0
    for value in parts:
        part = entry(value, "a part")
        text = part.get("text", "")
        if not isinstance(text, str):
            raise ValueError("a part's text is no text")
        if part.get("thought"):
            thoughts += len(text)
        else:
            texts.append(text)
    return ChatChoice("".join(texts), "length" if reason == "MAX_TOKENS" else "stop", thoughts)

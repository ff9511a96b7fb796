"""Every error of the service as RFC 9457 has it: `application/problem+json` with type, title, status, detail, instance.

Enters: what a route raises (`Problem`), what FastAPI finds in a request, what nobody foresaw. Leaves: one shape.
"""

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.config_tree import inner_configs
from medmm_ray.service.bodies import SHAPE, tag
from medmm_ray.service.request_ids import request_id

logger = logging.getLogger("ray.serve")

MEDIA_TYPE = "application/problem+json"


class Kind(Enum):
    """What can be wrong, with its HTTP status and title; the name is the last part of the problem's type."""

    BAD_REQUEST = (400, "The request cannot be read")
    UNAUTHENTICATED = (401, "The key is missing or wrong")
    FORBIDDEN = (403, "Not allowed")
    NOT_FOUND = (404, "There is nothing at this path")
    METHOD_NOT_ALLOWED = (405, "The path does not answer this method")
    TIMEOUT = (408, "The request took too long")
    TOO_LARGE = (413, "More than one request may hold")
    INVALID = (422, "The request is not valid")
    OVERLOADED = (429, "The service is busy")
    RATE_LIMITED = (429, "Too many requests")
    INTERNAL = (500, "A fault of the service")
    UNAVAILABLE = (503, "The service is not available")

    def __init__(self, status: int, title: str) -> None:
        self.status = status
        self.title = title

    # Relative to the service, which has no name of its own on the web.
    @property
    def uri(self) -> str:
        """The problem's type."""
        return f"/problems/{self.name.lower()}"


# Of the two with 429 the proxy's own is the service's, not a key's.
KIND_OF_STATUS: Mapping[int, Kind] = {kind.status: kind for kind in Kind if kind is not Kind.RATE_LIMITED}


class Fault(BaseModel):
    """One thing that is wrong with a body."""

    pointer: str
    """Where, as a JSON pointer (RFC 6901) in a fragment, such as `#/solutions/0`."""
    detail: str


class ProblemDetails(BaseModel):
    """An error: what is wrong, the value, what was expected."""

    type: str
    """`/problems/<kind>`: the same for all problems of a kind."""
    title: str
    status: int
    detail: str
    instance: str
    """The request's id, as `X-Request-Id` has it."""
    errors: list[Fault] | None = None
    """All that is wrong with the body, where it is not valid."""


class Problem(HTTPException):
    """An error that a client is told of. Starlette's own exception, for what is raised while a body is read passes."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Fault] | None = None,
    ) -> None:
        all_headers = dict(headers or {})  # a copy: the caller may use its own again
        if retry_after_s is not None:
            # Whole seconds, rounded up: the header knows no others, and earlier would be too early.
            all_headers["Retry-After"] = str(max(1, -int(-retry_after_s // 1)))
        super().__init__(kind.status, detail, all_headers)
        self.kind = kind
        self.errors = errors

    def response(self, scope: Scope) -> JSONResponse:
        """The answer to the request of `scope`."""
        details = ProblemDetails(
            type=self.kind.uri,
            title=self.kind.title,
            status=self.status_code,
            detail=self.detail,
            instance=request_id(scope),
            errors=None if self.errors is None else list(self.errors),
        )
        # A member that does not apply is left out, as the RFC has it.
        body = details.model_dump(exclude_none=True)
        return JSONResponse(body, self.status_code, self.headers, MEDIA_TYPE)


class CatchAll:
    """Middleware that answers what nobody foresaw with 500; its words, which may hold text, stay here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; a fault is logged by its kind and place."""
        has_begun = False

        async def send_noting(message: Message) -> None:
            """`send`, noting that the answer has begun."""
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        except Exception as error:
            # Of an answer that has begun nothing can be taken back: the connection breaks, which the client sees.
            if scope["type"] != "http" or has_begun:
                raise
            # Not the message: it may quote a question.
            logger.error("%s: %s at %s", request_id(scope), type(error).__name__, _place(error))
            problem = Problem(Kind.INTERNAL, f"{type(error).__name__}; the service's log has its place under this id")
            await problem.response(scope)(scope, receive, send)


def _place(error: Exception) -> str:
    """File and line where an error was raised, the innermost last."""
    places = []
    trace = error.__traceback__
    while trace:
        places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(places)


def add_problem_handlers(app: FastAPI) -> None:
    """Have `app` answer each of its errors with a problem."""

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        """A problem as it is; of an error of FastAPI's the problem with its status."""
        if isinstance(error, Problem):
            return error.response(request.scope)
        # FastAPI raises few of its own: 404, 405, and 400 for a body that it cannot read.
        kind = KIND_OF_STATUS.get(error.status_code, Kind.BAD_REQUEST)
        problem = Problem(kind, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers)
        return problem.response(request.scope)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        """All that is wrong with the body, in one 422."""
        faults: list[Fault] = []
        for fault in error.errors():
            faults.append(Fault(pointer=_pointer(fault), detail=_sentence(fault, request.scope)))
        detail = "; ".join(fault.detail for fault in faults)
        return Problem(Kind.INVALID, detail, errors=faults).response(request.scope)


def problems(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI page's entry of these errors; their schema is one of `problem_schemas`."""
    content = {MEDIA_TYPE: {"schema": {"$ref": _SCHEMAS + ProblemDetails.__name__}}}
    return {kind.status: {"description": kind.title, "content": content} for kind in kinds}


def problem_schemas() -> dict[str, Any]:
    """The schemas of a problem by their names among the page's components."""
    schema = ProblemDetails.model_json_schema(ref_template=_SCHEMAS + "{model}")
    return {**schema.pop("$defs"), ProblemDetails.__name__: schema}


_SCHEMAS = "#/components/schemas/"


def _sentence(fault: Mapping[str, Any], scope: Scope) -> str:
    """One of pydantic's errors in this service's words: the key, the value, what was expected."""
    if fault["type"] == "json_invalid":
        return f"body: no JSON from character {fault['loc'][-1]} on: {fault['ctx']['error']}"
    key = ".".join(_path(fault)) or "body"
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown name; known names: {', '.join(_names(fault, scope))}"
    if fault["type"] == "missing":
        return f"{key}: required, but missing"
    value = repr(fault["input"])
    if len(value) > 60:
        value = value[:60] + "…"
    return f"{key}: {value}: {fault['msg']}"


def _names(fault: Mapping[str, Any], scope: Scope) -> list[str]:
    """The names that may stand where a fault has an unknown one."""
    models = inner_configs(scope["route"].body_field.field_info.annotation)
    for part in fault["loc"][1:-1]:
        if str(part).startswith(SHAPE):
            # The path has several shapes: this one the body was taken for.
            models = [model for model in models if tag(model) == part]
            continue
        inner: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                inner += inner_configs(model.model_fields[part].annotation)
        # A place in a list names no field, and leads nowhere else.
        models = inner or models
    return [name for model in models for name in model.model_fields]


def _pointer(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "json_invalid":
        return "#"
    return "/".join(["#", *_path(fault)])


def _path(fault: Mapping[str, Any]) -> list[str]:
    """The place of an error in the body."""
    parts = [str(part) for part in fault["loc"] if part != "body"]
    # Which member of a union was tried (``list[…]``) is pydantic's word, no key of the body.
    return [part for part in parts if part not in UNION_MEMBERS and not part.startswith(("list[", SHAPE))]


UNION_MEMBERS = ("constrained-str", "str")

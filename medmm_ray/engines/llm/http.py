"""JSON posted over connections that stay open: an answer of any status, or a fault of the moment."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from medmm_ray.engines.llm.endpoint import EndpointError, RetryableError
from medmm_ray.engines.llm.faults import retry_after_seconds


@dataclass(frozen=True)
class HttpAnswer:
    """A whole answer."""

    status: int
    content: bytes
    content_type: str
    headers: Mapping[str, str]

    @property
    def wait_s(self) -> float | None:
        """Seconds that the server asks to wait."""
        return retry_after_seconds(self.headers.get("Retry-After"), self.content.decode(errors="replace"))


class HttpClient:
    """One per event loop; `timeout_s` is the longest wait for an answer, seconds."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._opened: AsyncIterator[aiohttp.ClientSession] | None = None

    async def post(self, url: str, body: bytes, headers: dict[str, str]) -> HttpAnswer:
        """Raises `RetryableError` where no whole answer came, `EndpointError` where `url` is none of HTTP."""
        try:
            session = await self._connected()
            async with session.post(url, data=body, headers=headers) as answer:
                content = await answer.read()
        except TimeoutError:
            raise RetryableError(f"no answer within {self._timeout_s:g} s", maybe_paid=True) from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise EndpointError(f"{url} is no address of an API; expected http(s)://host[:port]/path") from None
        except aiohttp.ClientConnectorError as error:  # nothing was sent
            raise RetryableError(f"no connection: {error}") from None
        except aiohttp.ClientError as error:
            raise RetryableError(f"the connection broke: {type(error).__name__} {error}", maybe_paid=True) from None
        return HttpAnswer(answer.status, content, answer.content_type, answer.headers)

    async def _connected(self) -> aiohttp.ClientSession:
        """The open connections, kept between calls in one event loop."""
        if self._session is None or self._session.closed:
            self._opened = self._open()
            self._session = await anext(self._opened)
        return self._session

    async def _open(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A session that ends with its event loop, which closes asynchronous generators."""
        connector = aiohttp.TCPConnector(limit=0)  # how many there are is the client's business
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=True) as session:  # proxies
            yield session


def entry(value: Any, name: str) -> dict[str, Any]:
    """A value of an answer's JSON that must be an object; `ValueError` where it is none."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no JSON object")
    return value


def or_empty(value: Any) -> dict[str, Any]:
    """A value of an answer's JSON, as an object in any case."""
    return value if isinstance(value, dict) else {}

"""Gate around the application: checks token, number of requests and time; counts and logs answers."""

from __future__ import annotations

__all__ = ["OPEN_PATHS", "Gate"]

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thawline.service.limits import Limits
from thawline.service.metrics import Metrics

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready")
"""Paths that need no token: probes send none, and they tell nothing."""


class Gate:
    """ASGI application around another one.

    Args:
        app: the application.
        paths: its paths; metrics count requests to others together.
        models: those of the paths that work on images.
        token: bearer token that requests must send. None: none.
    """

    def __init__(
        self,
        app: ASGIApp,
        paths: Sequence[str],
        models: Sequence[str],
        limits: Limits,
        metrics: Metrics,
        token: str | None = None,
    ) -> None:
        self.app, self.paths, self.models = app, paths, models
        self.limits, self.metrics = limits, metrics
        self._authorization = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        start, path = time.perf_counter(), scope["path"]
        try:
            if not self._is_allowed(scope):
                await self._refuse(
                    scope, receive, answer, 401, "Send the token: Authorization: Bearer TOKEN."
                )
            elif path not in self.models:
                await self.app(scope, receive, answer)
            elif self.metrics.active >= self.limits.max_requests:
                await self._refuse(scope, receive, answer, 503, "Too many requests at once. Try again.")
            else:
                await self._work(scope, receive, answer)
        except Exception:
            logger.exception("%s %s failed", scope["method"], path)
            if not answer.status:
                await self._refuse(
                    scope, receive, answer, 500, "Internal error; the service's log says more."
                )
        if answer.status >= 500:
            logger.error("%s %s: %d", scope["method"], path, answer.status)
        label = path if path in self.paths else "other"
        self.metrics.add(label, answer.status, time.perf_counter() - start)

    async def _work(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Run the application; if its answer takes too long, refuse in its place, and let it end unheard."""
        arrived = asyncio.Event()

        async def watched() -> Message:
            message = await receive()
            if not message.get("more_body"):
                arrived.set()
            return message

        task = asyncio.ensure_future(self.app(scope, watched, answer))
        self.metrics.active += 1
        task.add_done_callback(self._end)
        body = asyncio.ensure_future(arrived.wait())  # its own time is limited where it is read
        await asyncio.wait({task, body}, return_when=asyncio.FIRST_COMPLETED)
        body.cancel()
        done, _ = await asyncio.wait({task}, timeout=self.limits.timeout)
        if done:
            task.result()
        elif not answer.status:
            await self._refuse(scope, receive, answer, 504, "The answer took too long.")
            answer.is_over = True

    def _end(self, task: asyncio.Future[None]) -> None:
        self.metrics.active -= 1
        if not task.cancelled():
            task.exception()  # of a task that nobody waits for, so that it is not reported as lost

    def _is_allowed(self, scope: Scope) -> bool:
        if self._authorization is None or scope["path"] in OPEN_PATHS:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._authorization)

    async def _refuse(
        self, scope: Scope, receive: Receive, answer: _Answer, status: int, reason: str
    ) -> None:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status)
        await JSONResponse({"detail": reason}, status, headers)(scope, receive, answer)


class _Answer:
    """The way back to the client, with the status that was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.is_over = False

    async def __call__(self, message: Message) -> None:
        if self.is_over:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

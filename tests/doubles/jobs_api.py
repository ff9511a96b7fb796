"""Ray's Jobs API: jobs that are only written down, and logs that a test has written."""

from typing import Any

import ray
from aiohttp import web


class JobsApi:
    """A cluster's dashboard; with a `token` it answers nobody who does not show it."""

    def __init__(self, token: str | None = None, version: str = ray.__version__) -> None:
        self.token = token
        self.version = version
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.end_of_new_jobs: tuple[str, str] = ("SUCCEEDED", "Job finished successfully.")
        self.log_of_new_jobs = ""
        self.num_tails = 0
        self.breaks_first_tail_after: int | None = None
        self.is_overtaken = False
        """Whether another submission comes between a listing and the one that it leads to."""
        self.port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, job_id: str, status: str, message: str = "", log: str = "") -> None:
        """A job that is there."""
        self.jobs[job_id] = {
            "type": "SUBMISSION", "submission_id": job_id, "status": status, "message": message, "start_time": 0,
            "entrypoint": "python -m jobs.pipeline",
        }  # fmt: skip
        self.logs[job_id] = log

    async def open(self) -> web.AppRunner:
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 28)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/packages/{protocol}/{name}", self._package)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{id}", self._info)
        app.router.add_post("/api/jobs/{id}/stop", self._stop)
        app.router.add_get("/api/jobs/{id}/logs", self._logs)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        return runner

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        header = request.headers.get("Authorization")
        if self.token and header != f"Bearer {self.token}":
            return web.Response(status=403 if header else 401, text="no")
        response: web.StreamResponse = await handler(request)
        return response

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.version, "ray_commit": "", "session_name": ""})

    async def _package(self, _: web.Request) -> web.Response:
        return web.Response()  # uploaded already

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        job_id, (status, message) = body["submission_id"], self.end_of_new_jobs
        if self.is_overtaken:
            self.add(job_id, status, message, self.log_of_new_jobs)
        if job_id in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {job_id} already exists.")
        self.add(job_id, status, message, self.log_of_new_jobs)
        self.jobs[job_id] |= {"entrypoint": body["entrypoint"], "metadata": {}}
        self.submitted = body
        return web.json_response({"job_id": job_id, "submission_id": job_id})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["id"]])

    async def _stop(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["id"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    async def _logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self.logs[request.match_info["id"]]})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        socket, log = web.WebSocketResponse(), self.logs[request.match_info["id"]]
        await socket.prepare(request)
        self.num_tails += 1
        if self.num_tails == 1 and self.breaks_first_tail_after is not None:
            await socket.send_str(log[: self.breaks_first_tail_after])
            assert request.transport is not None
            request.transport.close()
            return socket
        for line in log.splitlines(keepends=True):
            await socket.send_str(line)
        return socket

"""A saved ResMemModule behind HTTP, with Ray Serve: micro-batches, checked inputs, health, graceful shutdown.

    python examples/serve.py               # trains on digits if need be, then serves; Ctrl-C or SIGTERM ends it
    python examples/serve.py --check       # the same, but classifies the test split over HTTP and ends
    python examples/serve.py --shards 2    # the memory is spread over two Ray actors, which all replicas ask

    curl -X POST localhost:8000/predict -d '{"inputs": [[0.0, 0.3, ... 64 numbers ...], ...]}'
    curl localhost:8000/health

Clients reach it through http_front.py, which bounds how many connections there are and how long a request may take to
arrive; Serve's own proxy bounds neither, and is off. Put TLS, and whatever says who may call, before it.

It joins the Ray cluster that RAY_ADDRESS names, or starts Ray on this machine. Change `load` for a model of your own.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import threading
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import ray
import requests
import torch
from digits import MLP, split
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from http_front import Limits, serving
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_resmem import InputError, RayMemory, ResMemCallback, ResMemError, ResMemModule

HIDDEN = 16
MAX_BYTES = 2**20  # of a request's body
MAX_ROWS = 256  # of a request, and of those that are answered together
SHARD_SECONDS = 20  # after which a shard counts as lost; a health check may take longer
ANSWER_SECONDS = 60  # after which a request is given up
LOGGING = {"log_level": "WARNING"}  # "INFO" for a line a request
UNAVAILABLE = "No answer can be given at the moment: try again."


class Answer(NamedTuple):
    """Of the service to a request: an HTTP status, the content of the JSON body, and what only its operator may see."""

    status: int
    content: dict[str, Any]
    details: dict[str, Any]


def parse(body: bytes, width: int) -> Tensor:
    """The rows of a request, `(n, width)` float32, or an error that says what to send."""
    wanted = f'{{"inputs": [[...], ...]}} with {width} numbers in each row'
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is not JSON ({error}): send {wanted}.") from error
    if not isinstance(content, dict) or "inputs" not in content:
        raise HTTPException(400, f"The body has no inputs: send {wanted}.")
    try:
        array = np.asarray(content["inputs"])
    except ValueError as error:
        raise HTTPException(422, f"The rows of inputs differ in length: send {wanted}.") from error
    if not array.size:
        raise HTTPException(422, f"inputs is empty: send {wanted}.")
    if array.dtype.kind not in "if":  # whole numbers beyond int64 are objects, or unsigned
        raise HTTPException(422, f"inputs holds something other than numbers within 64 bits: send {wanted}.")
    if array.ndim != 2 or array.shape[1] != width:
        raise HTTPException(422, f"inputs has shape {array.shape}: send {wanted}.")
    if len(array) > MAX_ROWS:
        raise HTTPException(413, f"inputs has {len(array)} rows: send at most {MAX_ROWS} at once.")
    rows = torch.from_numpy(array).float()
    bad = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise HTTPException(422, f"inputs has NaN or infinite numbers in rows {bad[:5]}.")
    return rows


@serve.deployment(
    max_ongoing_requests=MAX_ROWS,  # at a replica; others wait,
    max_queued_requests=1024,  # and beyond these the answer is 503
    health_check_period_s=5,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=30,  # for requests that are being answered
)
class ResMemService:
    """Answers from base and memory.

    Args:
        load: Makes the module, in each replica.
        width: Numbers in a row of inputs.
        batch_wait_s: How long a request waits for others to be answered with.
    """

    def __init__(self, load: Callable[[], ResMemModule], width: int, batch_wait_s: float) -> None:
        self._module, self._width = load(), width
        self._requests = self._batches = 0
        self._answer.set_batch_wait_timeout_s(batch_wait_s)

    async def predict(self, body: bytes) -> Answer:
        """Labels of base and ResMem, and ResMem's probabilities, for `{"inputs": [[...], ...]}`."""
        try:
            answer = await self._answer(parse(body, self._width))
        except HTTPException as error:
            return Answer(error.status_code, {"detail": error.detail}, {})
        if isinstance(answer, InputError):
            return Answer(422, {"detail": str(answer)}, {})
        if isinstance(answer, ResMemError):
            return Answer(503, {"detail": UNAVAILABLE}, {"detail": str(answer)})
        return Answer(200, answer, {})

    async def health(self) -> Answer:
        """Whether predictions can be made, and how many were."""
        try:
            stats = await asyncio.to_thread(self._check)
        except ResMemError as error:  # names a node
            return Answer(503, {"detail": UNAVAILABLE}, {"detail": str(error)})
        served = {"status": "ok", "requests": self._requests, "batches": self._batches, "rows": stats["rows"]}
        return Answer(200, served, {"shards": stats.get("shards", [])})

    async def check_health(self) -> None:
        """Ray Serve calls this now and then, and replaces a replica in which it raises an error."""
        await asyncio.to_thread(self._check)

    def _check(self) -> dict[str, Any]:
        """Search once, which takes all shards; the memory's stats."""
        memory = self._module.memory
        memory.search(torch.zeros(1, memory.stats()["width"]), k=1)
        return memory.stats()

    # One batch at a time, which is the default: each uses all that a replica has.
    @serve.batch(max_batch_size=MAX_ROWS, batch_size_fn=lambda batch: sum(map(len, batch)))
    async def _answer(self, inputs: list[Tensor]) -> list[dict[str, Any] | ResMemError]:
        """One answer for each request, from one forward and one search."""
        self._requests, self._batches = self._requests + len(inputs), self._batches + 1
        return await asyncio.to_thread(self._answers, inputs)

    def _answers(self, inputs: list[Tensor]) -> list[dict[str, Any] | ResMemError]:
        try:
            with torch.inference_mode():
                found = self._module.predictions((torch.cat(inputs),))
                probabilities = self._module.memory.task.to_outputs(found.resmem, found.base).exp()
        except ResMemError as error:
            return [error] * len(inputs)
        sizes = [len(rows) for rows in inputs]
        return list(map(_answer, probabilities.split(sizes), found.base.split(sizes)))


def _answer(resmem: Tensor, base: Tensor) -> dict[str, Any] | ResMemError:
    """The answer to one request; an input that the network makes infinite spoils no other."""
    if not torch.isfinite(resmem).all():
        return InputError("inputs make the network's outputs NaN or infinite: numbers so large may overflow.")
    return {
        "labels": resmem.argmax(dim=1).tolist(),
        "base_labels": base.argmax(dim=1).tolist(),
        "probabilities": resmem.tolist(),
    }


class Front:
    """What clients see: it reads requests, hands whole ones to the service, and hides what is not theirs to know.

    Args:
        service: A handle of `ResMemService`.
        details: Whether answers say where shards are and what went wrong with them.
    """

    def __init__(self, service: DeploymentHandle, details: bool) -> None:
        self._service, self._details = service, details
        self._looking: asyncio.Task[JSONResponse] | None = None

    def app(self) -> FastAPI:
        """The routes."""
        app = FastAPI(title="ResMem", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/predict", self.predict, methods=["POST"])
        app.add_api_route("/health", self.health)
        return app

    async def predict(self, request: Request) -> JSONResponse:
        return await self._told(self._service.predict.remote(await read(request)))

    async def health(self) -> JSONResponse:
        # However many ask, the shards are asked once at a time.
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._told(self._service.health.remote()))
        return await asyncio.shield(self._looking)

    async def _told(self, answer: Awaitable[Answer]) -> JSONResponse:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                status, content, details = await answer
        except (TimeoutError, RayServeException, ray.exceptions.RayError) as error:
            logging.getLogger(__name__).warning("No answer: %r", error)
            status, content, details = Answer(503, {"detail": UNAVAILABLE}, {"detail": repr(error)})
        headers = {"Retry-After": "5"} if status == 503 else None
        return JSONResponse(content | details if self._details else content, status, headers)


async def read(request: Request) -> bytes:
    """The body of a request, no more of it than may be."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                raise HTTPException(413, f"The body has more than {MAX_BYTES} bytes: send fewer rows at once.")
    except ClientDisconnect as error:
        raise HTTPException(400, "The connection ended before the request did.") from error
    return bytes(body)


def train(directory: Path) -> None:
    """Train a network on digits; its weights and its memory go to the directory."""
    L.seed_everything(0, verbose=False)
    train, val, _ = split(seed=0)
    resmem = ResMemCallback()
    trainer = L.Trainer(
        max_epochs=10,
        callbacks=[resmem],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MLP(HIDDEN), DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=300))
    resmem.module.save(directory / "resmem", overwrite=True)  # of weights that are gone
    trainer.save_checkpoint(directory / "base.ckpt")


def load(directory: Path, pool: str | None) -> ResMemModule:
    """Base and memory, in each replica: on a cluster, `directory` is one that all nodes see."""
    torch.set_num_threads(1)  # what a replica has reserved; more replicas use more cores
    base = MLP.load_from_checkpoint(directory / "base.ckpt", map_location="cpu", hidden=HIDDEN)
    if pool is None:
        return ResMemModule.load(directory / "resmem", base=base)
    return ResMemModule(base, RayMemory.connect(pool, request_timeout_s=SHARD_SECONDS))


def check(url: str) -> None:
    """Classify the test split over HTTP, seven rows a request and sixteen requests at once."""
    inputs, targets = split(seed=0)[2].tensors

    def predict(rows: Tensor) -> dict[str, Any]:
        answer = requests.post(f"{url}/predict", json={"inputs": rows.tolist()}, timeout=60)
        answer.raise_for_status()
        return answer.json()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(predict, inputs.split(7)))
    health = requests.get(f"{url}/health", timeout=60).json()
    for name in ("base_labels", "labels"):
        labels = torch.tensor([label for answer in answers for label in answer[name]])
        print(f"{name}: accuracy {(labels == targets).float().mean():.4f} on {len(targets)} rows")
    print(f"{health['requests']} requests were answered in {health['batches']} batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("outputs/serve"), help="weights and memory")
    parser.add_argument("--port", type=int, default=8000, help="on this machine only (default: 8000)")
    parser.add_argument("--replicas", type=int, default=1, help="processes that answer (default: 1)")
    parser.add_argument("--shards", type=int, default=0, help="actors with the memory (default: 0, in each replica)")
    parser.add_argument("--batch-wait", type=float, default=0.005, help="seconds to wait for others (default: 0.005)")
    parser.add_argument("--read-seconds", type=float, default=10.0, help="for a request to arrive (default: 10)")
    parser.add_argument("--connections", type=int, default=512, help="open at once (default: 512)")
    parser.add_argument("--details", action="store_true", help="let anyone see hosts and processes in /health")
    parser.add_argument("--check", action="store_true", help="classify the test split over HTTP, and end")
    arguments = parser.parse_args()
    directory, url = arguments.directory.absolute(), f"http://127.0.0.1:{arguments.port}"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    ended, memory, pool = threading.Event(), None, None
    if not (directory / "base.ckpt").exists():
        train(directory)
    # A cluster has CPUs of its own; on one machine replicas and shards share what there is.
    cpus = None if "RAY_ADDRESS" in os.environ else max(os.cpu_count() or 1, arguments.replicas + arguments.shards)
    ray.init(os.environ.get("RAY_ADDRESS", "local"), num_cpus=cpus, logging_level=logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which has a handler of its own
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(proxy_location="Disabled", logging_config=LOGGING)
        if arguments.shards:  # under a name, by which the replicas find it
            pool = f"serve-{uuid.uuid4().hex[:8]}"
            memory = RayMemory.load(directory / "resmem", num_shards=arguments.shards, name=pool)
        service = ResMemService.options(num_replicas=arguments.replicas, logging_config=LOGGING)
        loaded = partial(load, directory, pool)
        handle = serve.run(service.bind(loaded, 64, arguments.batch_wait), name="resmem", route_prefix=None)
        limits = Limits(arguments.read_seconds, arguments.connections)
        with serving(Front(handle, arguments.details).app(), arguments.port, limits):
            print(f"Serving on {url}", flush=True)
            if arguments.check:
                check(url)
            else:
                ended.wait()
                print("Ending: no new requests, those under way are answered", flush=True)
        serve.delete("resmem")
    finally:
        serve.shutdown()
        if memory is not None:
            memory.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()

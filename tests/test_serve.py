"""examples/serve.py over HTTP, started as its help says: right answers, clear errors, micro-batches, health, an end."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import torch
from starlette.testclient import TestClient

from examples.digits import MLP, split
from lightning_resmem import ResMemModule
from tests.ddp_processes import free_port
from tests.interpreters import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]  # processes start slowly on a busy machine

START_SECONDS = 150
READ_SECONDS = 20
BATCH_WAIT = 0.1  # long, so that requests that come together are surely answered together


class Service(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    directory: Path

    def get(self, route: str) -> requests.Response:
        return requests.get(self.url + route, timeout=60)

    def post(self, body: bytes | dict[str, Any]) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body)
        return requests.post(f"{self.url}/predict", data=data, timeout=60)

    def predict(self, inputs: torch.Tensor) -> dict[str, Any]:
        answer = self.post({"inputs": inputs.tolist()})
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def service(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory, port = tmp_path_factory.mktemp("serve"), free_port()
    options = ["--directory", str(directory), "--port", str(port), "--batch-wait", str(BATCH_WAIT), "--shards", "2"]
    options += ["--details", "--read-seconds", str(READ_SECONDS), "--connections", "400"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "serve.py"), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_address, "OMP_NUM_THREADS": "1"},
        stdout=(directory / "output").open("w"),
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + START_SECONDS
    try:
        while "Serving on" not in (directory / "output").read_text():
            assert process.poll() is None, (directory / "output").read_text()
            assert time.monotonic() < deadline, (directory / "output").read_text()
            time.sleep(0.1)
        yield Service(process, f"http://127.0.0.1:{port}", directory)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()


def rows(count: int) -> torch.Tensor:
    return split(seed=0)[2].tensors[0][:count]


def test_answers_are_the_modules(service: Service) -> None:
    inputs = rows(20)
    base = MLP.load_from_checkpoint(service.directory / "base.ckpt", hidden=16)
    module = ResMemModule.load(service.directory / "resmem", base=base)
    answer = service.predict(inputs)
    expected = module(inputs).exp()
    torch.testing.assert_close(torch.tensor(answer["probabilities"]), expected, rtol=0, atol=1e-6)
    assert answer["labels"] == expected.argmax(dim=1).tolist()
    assert answer["base_labels"] == base(inputs).argmax(dim=1).tolist()


GOOD = [0.5] * 64


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"inputs", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[1, 2]", 400, "has no inputs"),
        ({"rows": [GOOD]}, 400, "has no inputs"),
        ({"inputs": []}, 422, "inputs is empty"),
        ({"inputs": [[]]}, 422, "inputs is empty"),
        ({"inputs": GOOD}, 422, r"shape (64,)"),
        ({"inputs": [GOOD[1:]]}, 422, r"shape (1, 63)"),
        ({"inputs": [[GOOD]]}, 422, r"shape (1, 1, 64)"),
        ({"inputs": [GOOD, GOOD[1:]]}, 422, "differ in length"),
        ({"inputs": None}, 422, "other than numbers"),
        ({"inputs": [["0.5"] * 64]}, 422, "other than numbers"),
        ({"inputs": [[True] * 64]}, 422, "other than numbers"),
        ({"inputs": [[10**400] * 64]}, 422, "other than numbers"),
        ({"inputs": [[2**63] * 64]}, 422, "within 64 bits"),
        ({"inputs": [[2**64] * 64]}, 422, "within 64 bits"),
        ({"inputs": [[-(2**63) - 1] * 64]}, 422, "within 64 bits"),
        ({"inputs": [GOOD, [float("nan")] * 64]}, 422, "NaN or infinite numbers in rows [1]"),
        ({"inputs": [[1e300] * 64]}, 422, "NaN or infinite numbers in rows [0]"),
        ({"inputs": [[1e38] * 64]}, 422, "may overflow"),  # finite, but the network's answer is not
        ({"inputs": [[1] * 64] * 257}, 413, "257 rows: send at most 256"),
        (b" " * (2**20 + 1), 413, "more than 1048576 bytes"),
    ],
)
def test_bad_requests(service: Service, body: bytes | dict[str, Any], status: int, message: str) -> None:
    answer = service.post(body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


def test_other_routes_and_methods(service: Service) -> None:
    assert service.get("/predict").status_code == 405
    assert service.get("/nothing").status_code == 404


def test_requests_are_answered_together_and_each_with_its_own(service: Service) -> None:
    inputs = rows(60)
    before = service.get("/health").json()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(service.predict, inputs.split(3)))
    after = service.get("/health").json()
    assert after["requests"] - before["requests"] == 20
    assert after["batches"] - before["batches"] <= 10
    together = service.predict(inputs)
    assert [label for answer in answers for label in answer["labels"]] == together["labels"]


def test_an_input_that_overflows_spoils_no_other_request(service: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"inputs": [[1e38] * 64 if number == 3 else GOOD]} for number in range(8)]
        answers = list(pool.map(service.post, bodies))
    assert [answer.status_code for answer in answers] == [422 if number == 3 else 200 for number in range(8)]


def test_300_clients_that_send_one_byte_stop_nobody(service: Service) -> None:
    port, inputs = int(service.url.rpartition(":")[2]), rows(5)
    expected = service.predict(inputs)
    with ExitStack() as stack:
        started = time.monotonic()
        for number in range(300):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=READ_SECONDS + 20))
            head = b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n" if number % 2 else b""
            client.sendall(head + b"{")
        for _ in range(3):
            assert service.predict(inputs) == expected
            assert service.get("/health").status_code == 200
        assert time.monotonic() - started < READ_SECONDS, "while all of them were there"
        assert client.recv(1000).startswith(b"HTTP/1.1 408")


def test_health_and_a_shard_that_dies(service: Service) -> None:
    before = service.predict(rows(5))
    health = service.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert health.json()["rows"] == sum(shard["rows"] for shard in health.json()["shards"]) == 1000
    assert [shard["restarts"] for shard in health.json()["shards"]] == [0, 0]
    os.kill(health.json()["shards"][1]["pid"], signal.SIGKILL)
    assert service.predict(rows(5)) == before
    assert [shard["restarts"] for shard in service.get("/health").json()["shards"]] == [0, 1]


class Stub:
    """In the place of Serve's handle: its service says that a shard is lost."""

    class predict:
        @staticmethod
        async def remote(body: bytes) -> tuple[int, dict[str, Any], dict[str, Any]]:
            return 503, {"detail": "Try again."}, {"detail": "Shard 1 on node 10.0.0.7 (pid 4711) does not answer."}

    class health:
        @staticmethod
        async def remote() -> tuple[int, dict[str, Any], dict[str, Any]]:
            return 200, {"status": "ok", "rows": 7}, {"shards": [{"node": "10.0.0.7", "pid": 4711}]}


@pytest.mark.parametrize("details", [False, True])
def test_hosts_and_processes_are_told_only_if_the_operator_says_so(
    details: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as for a script
    front = importlib.import_module("serve").Front(Stub(), details)
    client = TestClient(front.app())
    failed, health = client.post("/predict", content=b"{}"), client.get("/health")
    assert (failed.status_code, failed.headers["Retry-After"]) == (503, "5")
    assert health.json()["rows"] == 7
    for told in (failed.text, health.text):
        assert ("10.0.0.7" in told) is ("4711" in told) is details


def test_ends_when_told_and_answers_what_is_under_way(service: Service) -> None:
    """The last test: it ends the service."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.predict, rows(1))
        time.sleep(BATCH_WAIT / 2)  # it waits for others by now
        service.process.send_signal(signal.SIGTERM)
        assert len(answer.result()["labels"]) == 1
    assert service.process.wait(timeout=60) == 0, (service.directory / "output").read_text()
    with pytest.raises(requests.ConnectionError):
        service.get("/health")

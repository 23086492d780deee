"""Load `server.py` on loopback: requests a second and 99th percentile of float, `quantize_dynamic` and scalefold.

Where the processor has AVX512-VNNI, scalefold's folders after `scalefold fuse` too.

    load_test.py                            MiniLM and SmolLM2; about 15 minutes, most of them to export and compile
    load_test.py --decoder gpt2-tiny --requests 20 --rounds 1         a first look

One server for each contender is up all the time, and all answer in turns, so that a slow spell of the machine meets all of
them. In a turn every client sends its share of the requests one after the other; an answer that is not 200 ends the test.
The clients run on the same machine and take their part of its time.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from scalefold.compiler import compile_model, fuse_folder
from scalefold.compiler.calibrate import default_texts
from scalefold.compiler.export import export_model
from scalefold.compiler.kernel_library import is_fast, library

RUN = Path(__file__).with_name("run.py")
READY_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 180, 120, 5
CONTENDERS = ("float", "quantize_dynamic", "scalefold", "fused")
TEXTS, PROMPT_WORDS, NEW_TOKENS = 8, 32, 32


class LoadError(Exception):
    """The test cannot go on; the message says why."""


@dataclass
class Endpoint:
    """What one contender's server did with one kind of request.

    Attributes:
        path: of the endpoint.
        body: of every request.
        rates: requests a second, one for each turn.
        seconds: of every answer.
    """

    path: str
    body: bytes
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def turn(self, port: int, requests: int, clients: int) -> None:
        """Send the requests and note what they took."""
        shares = [requests // clients + (client < requests % clients) for client in range(clients)]
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            for taken in pool.map(lambda share: self._send(port, share), shares):
                self.seconds += taken
        self.rates.append(requests / (time.perf_counter() - start))

    def _send(self, port: int, requests: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
        taken = []
        for _ in range(requests):
            start = time.perf_counter()
            status, answer = post(connection, self.path, self.body)
            if status != http.HTTPStatus.OK:
                raise LoadError(f"{self.path} answered {status}: {answer[:200]!r}")
            taken.append(time.perf_counter() - start)
        connection.close()
        return taken

    def percentile(self, share: float) -> float:
        """The seconds that this share of the answers took at most."""
        ordered = sorted(self.seconds)
        return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, bytes]:
    """Send one request; the status and the body of the answer."""
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


@contextmanager
def running(*options: str) -> Iterator[int]:
    """A server with these options on a free port of loopback, stopped with all its processes at the end.

    Raises:
        LoadError: it did not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    words = [sys.executable, str(RUN), "server", "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait(process, port, log)
            yield port
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    end = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        time.sleep(0.2)
    log.seek(0)
    said = log.read().strip().splitlines() or ["no message"]
    raise LoadError(f"the server did not come up: {said[-1]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole group: LitServe's workers outlive a signal to their parent alone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


# The contenders' folders ---------------------------------------------------------------------------------------------


def chosen() -> tuple[str, ...]:
    """The contenders that this machine has a use for."""
    return CONTENDERS if is_fast(library()) else CONTENDERS[:-1]


def folders(model: str, work: Path, exported: Path | None = None) -> dict[str, Path]:
    """The folder of each contender for a model, made where `work` has none.

    Args:
        model: a reference model, such as `minilm`.
        work: keeps them.
        exported: a float export to start from instead.
    """
    made = {name: work / model / name for name in chosen()}
    if not made["float"].is_dir():
        partial = made["float"].with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        if exported is None:
            module = importlib.import_module(f"scalefold.models.{model.replace('-', '_')}")
            export_model(module.build(), partial, module.TASK)
        else:
            shutil.copytree(exported, partial)
        partial.rename(made["float"])
    if not (made["quantize_dynamic"] / "model.onnx").is_file():
        _quantize_dynamic(made["float"], made["quantize_dynamic"])
    if not made["scalefold"].is_dir():
        compile_model(made["float"] / "model.onnx", made["scalefold"])
    if "fused" in made and not made["fused"].is_dir():
        fuse_folder(made["scalefold"], made["fused"])
    return made


def _quantize_dynamic(source: Path, out: Path) -> None:
    """At its best settings: per channel; MatMul alone at 7 bits for a decoder, which saturates without VNNI at 8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    out.mkdir(parents=True, exist_ok=True)
    whole, prepared = out / "whole.onnx", out / "prepared.onnx"
    model = onnx.load(str(source / "model.onnx"))
    decoder = any(value.name == "logits" for value in model.graph.output)
    settings: dict[str, Any] = {"reduce_range": True, "op_types_to_quantize": ["MatMul"]} if decoder else {}
    onnx.save(model, str(whole))
    quant_pre_process(whole, prepared, auto_merge=True)
    quantize_dynamic(prepared, out / "model.onnx", weight_type=QuantType.QInt8, per_channel=True, **settings)
    for file in (whole, prepared):
        file.unlink()
    for file in source.glob("*.json"):
        shutil.copy(file, out)


# The test -------------------------------------------------------------------------------------------------------------


def measure(work: Path, options: argparse.Namespace) -> dict[str, dict[str, Endpoint]]:
    """By endpoint and contender: what the server did."""
    encoders = folders("minilm", work)
    decoders = folders(options.decoder, work, options.exported)
    found: dict[str, dict[str, Endpoint]] = {
        path: {name: Endpoint(path, body) for name in encoders} for path, body in bodies().items()
    }
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(
                running(
                    "--embed", str(encoders[name]), "--generate", str(decoders[name]), "--threads", str(options.threads)
                )
            )
            for name in encoders
        }
        for path, body in bodies().items():
            for name in encoders:
                Endpoint(path, body).turn(ports[name], options.clients, options.clients)
            for _ in range(options.rounds):
                for name in encoders:
                    found[path][name].turn(ports[name], options.requests, options.clients)
    return found


def bodies() -> dict[str, bytes]:
    """A request of each endpoint, out of the default calibration text."""
    texts = default_texts()[:TEXTS]
    prompt = " ".join(" ".join(texts).split()[:PROMPT_WORDS])
    return {
        "/embed": json.dumps({"texts": texts}).encode(),
        "/generate": json.dumps({"prompt": prompt, "max_new_tokens": NEW_TOKENS}).encode(),
    }


def table(path: str, found: dict[str, Endpoint]) -> str:
    """Markdown: the median of the turns, its ratio to float in the same round, and the times of all answers."""
    lines = [
        f"| {path} | requests/s | to float | median, ms | 99th percentile, ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, endpoint in found.items():
        ratios = [mine / base for mine, base in zip(endpoint.rates, found["float"].rates, strict=True)]
        lines.append(
            f"| {name} | {median(endpoint.rates):.1f} | {median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] "
            f"| {1e3 * endpoint.percentile(0.5):.1f} | {1e3 * endpoint.percentile(0.99):.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="smollm2", help="a reference model: smollm2 or gpt2-tiny")
    parser.add_argument(
        "--exported", type=Path, metavar="FOLDER", help="the decoder's float export, to save the export"
    )
    parser.add_argument("--requests", type=int, default=40, help="in a turn (default: 40)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender and endpoint (default: 5)")
    parser.add_argument("--clients", type=int, default=4, help="at the same time (default: 4)")
    parser.add_argument("--threads", type=int, default=2, help="of onnxruntime for each model (default: 2)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep the models here for a second run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every rate and time here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="scalefold-load-") as scratch:
        try:
            found = measure(options.work or Path(scratch), options)
        except LoadError as error:
            sys.exit(f"error {error}")
    print(
        f"{options.clients} clients, {options.rounds} x {options.requests} requests each, {options.threads} threads\n"
    )
    print("\n\n".join(table(path, endpoints) for path, endpoints in found.items()))
    if options.json:
        record = {
            path: {name: {"rates": e.rates, "seconds": e.seconds} for name, e in endpoints.items()}
            for path, endpoints in found.items()
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

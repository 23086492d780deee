"""Serve compiled folders over HTTP with LitServe: `server.py --embed FOLDER --generate FOLDER`.

    POST /embed     {"texts": ["..."], "adapter": "NAME"}                            -> {"embeddings": [[...]]}
    POST /generate  {"prompt": "...", "max_new_tokens": 16, "adapter": "NAME"}       -> {"text": "...", "tokens": [...]}
    GET  /health    200 once the models are loaded

A request without an adapter gets the model as it was compiled. What is refused is in `served_models.py`; the answer is
{"detail": "one sentence"} there.
"""

# LitServe reads the annotation of a request's type, which therefore must not be put off to be a string.

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import litserve
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from scalefold.compiler.errors import ScalefoldError

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts.examples.served_models import (
        BAD_REQUEST,
        EmbeddingModel,
        GenerationModel,
        RefusedError,
        check_adapters,
    )
else:
    from served_models import BAD_REQUEST, EmbeddingModel, GenerationModel, RefusedError, check_adapters

Adapters = dict[str, Path]


def answered(run: Callable[..., Any], *arguments: Any) -> Any:
    """What a model says, a refusal as an answer of HTTP."""
    try:
        return run(*arguments)
    except RefusedError as refusal:
        raise HTTPException(refusal.status, refusal.sentence) from None


def no_object(request: Request, error: Exception) -> JSONResponse:
    """The answer to a body that is not even a JSON object, which FastAPI finds before any model does."""
    return JSONResponse({"detail": "The body is not a JSON object; send one, as application/json."}, BAD_REQUEST)


class Embed(litserve.LitAPI):  # type: ignore[misc]
    """The endpoint of embeddings."""

    def __init__(self, folder: Path, adapters: Adapters, threads: int) -> None:
        super().__init__(api_path="/embed")
        self.settings = (folder, adapters, threads)

    def setup(self, device: str) -> None:
        """Load the model, in the worker's process."""
        self.model = EmbeddingModel(*self.settings)

    def decode_request(self, request: dict[str, Any]) -> Any:
        """Check a request and turn it into a feed."""
        return answered(self.model.prepare, request)

    def predict(self, prepared: Any) -> Any:
        """Run it."""
        return {"embeddings": self.model.embed(*prepared)}


class Generate(litserve.LitAPI):  # type: ignore[misc]
    """The endpoint of generation."""

    def __init__(self, folder: Path, adapters: Adapters, threads: int) -> None:
        super().__init__(api_path="/generate")
        self.settings = (folder, adapters, threads)

    def setup(self, device: str) -> None:
        """Load the model, in the worker's process."""
        self.model = GenerationModel(*self.settings)

    def decode_request(self, request: dict[str, Any]) -> Any:
        """Check a request and turn it into tokens."""
        return answered(self.model.prepare, request)

    def predict(self, prepared: Any) -> Any:
        """Run it."""
        return self.model.generate(*prepared)


def adapter(text: str) -> tuple[str, Path]:
    """NAME=FOLDER of the command line."""
    name, mark, folder = text.partition("=")
    if not (name and mark and folder):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FOLDER")
    return name, Path(folder)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed", type=Path, metavar="FOLDER", help="an encoder")
    parser.add_argument("--embed-adapter", type=adapter, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--generate", type=Path, metavar="FOLDER", help="a decoder with a cache")
    parser.add_argument("--generate-adapter", type=adapter, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime for each model; 0 lets it choose")
    options = parser.parse_args(arguments)
    models = ((Embed, options.embed, options.embed_adapter), (Generate, options.generate, options.generate_adapter))
    wanted = [(endpoint, folder, dict(adapters)) for endpoint, folder, adapters in models if folder]
    if not wanted:
        parser.error("give --embed or --generate")
    try:
        for _, folder, adapters in wanted:
            check_adapters(folder, adapters)  # a worker that finds a fault would only leave a traceback
    except ScalefoldError as error:
        sys.exit(f"error {error}")
    endpoints = [endpoint(folder, adapters, options.threads) for endpoint, folder, adapters in wanted]
    server = litserve.LitServer(endpoints, accelerator="cpu", workers_per_device=1)
    server.app.add_exception_handler(RequestValidationError, no_object)
    server.run(host=options.host, port=options.port, num_api_servers=1, generate_client_file=False)


if __name__ == "__main__":
    main(sys.argv[1:])

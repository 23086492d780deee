"""Print KServe's InferenceService for a model repository of Triton: `kserve_files.py NAME STORAGE_URI > service.yaml`.

KServe's ONNX route with an integer CPU kernel is its Triton runtime, so the storage holds what `triton_files.py` wrote:
`pvc://CLAIM/REPOSITORY`, `s3://BUCKET/REPOSITORY` or any other address that KServe's storage initializer reads.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import yaml

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def inference_service(name: str, storage: str, *, cpus: int, memory: str) -> dict[str, Any]:
    """The resource.

    Args:
        name: of the service, as Kubernetes takes it.
        storage: the address of the repository.
        cpus: requested and at most, since onnxruntime starts a thread for each.
        memory: requested and at most, such as `1Gi`.
    """
    size = {"cpu": str(cpus), "memory": memory}
    model = {
        "modelFormat": {"name": "onnx"},
        "runtime": "kserve-tritonserver",
        "protocolVersion": "v2",
        "storageUri": storage,
        "resources": {"requests": size, "limits": dict(size)},
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {"predictor": {"model": model}},
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("storage_uri")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", default="1Gi")
    options = parser.parse_args(arguments)
    if not NAME.fullmatch(options.name):
        sys.exit(
            f"error {options.name}: it is no name that Kubernetes takes; use lower case letters, digits and dashes."
        )
    service = inference_service(options.name, options.storage_uri, cpus=options.cpus, memory=options.memory)
    print(yaml.safe_dump(service, sort_keys=False), end="")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Check an InferenceService against KServe's published schema: `check_kserve.py service.yaml`.

The schema are the OpenAPI types that KServe's Python package carries, and those of Kubernetes that they name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import kserve
import kubernetes
import yaml

PLAIN: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "object": object, "datetime": str}


def faults(value: Any, kind: str, where: str) -> list[str]:
    """What is not as the schema has it, each with its place.

    Args:
        value: of the file.
        kind: the type that the schema gives it: a name, `list[NAME]` or `dict[str, NAME]`.
        where: the keys that lead to it.
    """
    if kind in PLAIN:
        return [] if isinstance(value, PLAIN[kind]) else [f"{where} is no {kind}"]
    if inside := re.fullmatch(r"list\[(.+)\]", kind):
        entries = value if isinstance(value, list) else [value]
        return [fault for entry in entries for fault in faults(entry, inside[1], where)]
    if inside := re.fullmatch(r"dict[\[(]str, (.+)[\])]", kind):
        return [fault for key, entry in value.items() for fault in faults(entry, inside[1], f"{where}.{key}")]
    known = getattr(kserve, kind, None) or getattr(kubernetes.client, kind)
    types = {known.attribute_map[name]: kind for name, kind in known.openapi_types.items()}
    if not isinstance(value, dict):
        return [f"{where} is no {kind}"]
    found = [f"{where} has no {key}" for key in value if key not in types]
    return found + [
        fault for key, entry in value.items() if key in types for fault in faults(entry, types[key], f"{where}.{key}")
    ]


if __name__ == "__main__":
    service = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if wrong := faults(service, "V1beta1InferenceService", "InferenceService"):
        sys.exit(f"error {sys.argv[1]}: {'; '.join(wrong)}.")
    print(f"{service['metadata']['name']} is valid: {service['apiVersion']} {service['kind']}")

"""Check config.pbtxt against Triton's published protobuf schema: `check_triton.py REPOSITORY/NAME`.

The schema is model_config.proto as tritonclient ships it; a field or a type that is not in it is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config = text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    types = model_config_pb2.DataType
    for kind, ports in (("input", config.input), ("output", config.output)):
        for port in ports:
            print(f"{kind} {port.name} {types.Name(port.data_type)} {list(port.dims)}")
    for library in config.model_operations.op_library_filename:
        print(f"library {library}")
    print(f"{config.name} is valid: backend {config.backend}, batches of at most {config.max_batch_size}")

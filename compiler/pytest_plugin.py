"""pytest fixtures for graphs: `assert_graph_matches` compares with a golden file, `kernel_contract` checks the kernels.

Installed with the package. Everything but pytest is imported when a test asks for one of the fixtures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import onnx_ir as ir

SHOWN = 60
"""Lines of a difference that an error shows."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`."""
    group = parser.getgroup("scalefold")
    group.addoption(
        "--update-golden", action="store_true", help="write the graphs that differ from their golden files to them"
    )


@pytest.fixture
def assert_graph_matches(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Assert that a graph is the one a golden file shows.

    `assert_graph_matches(model, "golden/name.onnxtxt", tolerance=0.0)`: the model is an `onnx_ir.Model`, an
    `onnx.ModelProto`, a file or a folder with `model.onnx` in it; the golden file lies beside the test. With a tolerance,
    what calibration decides is written as rounded figures, which may be so far apart, relative to the larger.
    `--update-golden` writes files that are missing or differ.
    """

    def check(model: object, golden: str | Path, *, tolerance: float = 0.0) -> None:
        from scalefold.compiler.golden import golden_difference, golden_text

        __tracebackhide__ = True
        path = request.path.parent / golden
        text = golden_text(_model_of(model), figures=tolerance > 0)
        difference = golden_difference(path.read_text(encoding="utf-8"), text, tolerance) if path.is_file() else text
        if not difference:
            return
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.is_file():
            raise AssertionError(f"there is no golden file {path}; pytest --update-golden writes it")
        lines = difference.splitlines()
        more = [f"... and {len(lines) - SHOWN} more lines"] if len(lines) > SHOWN else []
        raise AssertionError(
            "\n".join([f"the graph is not that of {path}; pytest --update-golden accepts it:", *lines[:SHOWN], *more])
        )

    return check


@pytest.fixture
def kernel_contract() -> Callable[..., None]:
    """Assert that onnxruntime runs every linear layer of a model with an integer kernel on this machine.

    `kernel_contract(model, allow_float=["pooler"])`: the model as in `assert_graph_matches`; the patterns are those of
    `scalefold verify --allow-float`.
    """

    def check(model: object, allow_float: Sequence[str] = ()) -> None:
        __tracebackhide__ = True
        path = Path(model) if isinstance(model, str | Path) else None
        if path is not None:
            _check_kernels(path / "model.onnx" if path.is_dir() else path, allow_float)
            return
        import onnx_ir as ir

        with tempfile.TemporaryDirectory() as folder:
            ir.save(_model_of(model), Path(folder) / "model.onnx", external_data="model.onnx.data")
            _check_kernels(Path(folder) / "model.onnx", allow_float)

    return check


def _check_kernels(path: Path, allow_float: Sequence[str]) -> None:
    from scalefold.compiler import verify
    from scalefold.compiler.errors import KernelError
    from scalefold.compiler.protocol import select

    __tracebackhide__ = True
    kernels = verify.layer_kernels(path)
    assert kernels, f"{path} has no linear layer"
    try:
        verify.require_integer_kernels(kernels, allow_float)
    except KernelError as error:
        raise AssertionError(str(error)) from None
    allowed = select(allow_float, [kernel.name for kernel in kernels], what="allow-float")
    left = [kernel.name for kernel in kernels if not kernel.integer and kernel.name not in allowed]
    assert not left, f"{len(left)} linear layers are float: {', '.join(left)}"


def _model_of(model: Any) -> ir.Model:
    import onnx_ir as ir

    from scalefold.compiler.intake import read_onnx

    if isinstance(model, str | Path):
        path = Path(model)
        return read_onnx(path / "model.onnx" if path.is_dir() else path)
    return model if isinstance(model, ir.Model) else ir.from_proto(model)

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import artifact, graph
from scalefold.compiler.decode_chain import remember
from scalefold.compiler.errors import OutputError
from scalefold.compiler.protocol import Context
from scalefold.compiler.recipe import WeightFormat
from scalefold.compiler.runtime import Feed, Session
from scalefold.passes.pack_weights import PackWeights
from scalefold.passes.quantize_embeddings import QuantizeEmbeddings
from scalefold.passes.quantize_weights import quantized

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, 2] x, int64[b] n) => (float[b, 2] y)
<float[2] c = {1.0, 2.0}>
{ y = Add(x, c) }"""


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def result(folder: Path, text: str = "new") -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_text(text, encoding="utf-8")
    (folder / "scalefold.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_staged_folder_lies_beside_its_place_and_is_gone_afterwards(tmp_path: Path) -> None:
    with artifact.staged(tmp_path / "deep" / "out") as scratch:
        assert scratch.parent == tmp_path / "deep"
        assert scratch.name.startswith(".out.partial-")
        (scratch / "model.onnx").write_bytes(b"half")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("fault", [ValueError("bug"), KeyboardInterrupt()])
def test_a_staged_folder_goes_whatever_happens_in_it(tmp_path: Path, fault: BaseException) -> None:
    earlier = content_of(result(tmp_path / "out", "old"))

    def fail() -> None:
        with artifact.staged(tmp_path / "out") as scratch:
            result(scratch / "result")
            raise fault

    with pytest.raises(type(fault)):
        fail()
    assert content_of(tmp_path / "out") == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_called_a_full_disk(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError, match="the disk is full"), artifact.staged(tmp_path / "out"):
        raise OSError(number, os.strerror(number))


def test_publishing_puts_the_new_folder_in_place_of_the_old(tmp_path: Path) -> None:
    result(tmp_path / "out", "old")
    (tmp_path / "out" / "left-over.txt").write_text("old", encoding="utf-8")
    new = content_of(result(tmp_path / "stage"))
    artifact.publish(tmp_path / "stage", tmp_path / "out")
    assert content_of(tmp_path / "out") == new
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publishing_makes_a_place_that_was_not_there(tmp_path: Path) -> None:
    new = content_of(result(tmp_path / "stage"))
    artifact.publish(tmp_path / "stage", tmp_path / "out")
    assert content_of(tmp_path / "out") == new


def test_a_rename_that_fails_brings_the_earlier_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = content_of(result(tmp_path / "out", "old"))
    stage = result(tmp_path / "stage")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == stage:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        artifact.publish(stage, tmp_path / "out")
    assert content_of(tmp_path / "out") == earlier


def test_an_interrupt_between_the_renames_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = content_of(result(tmp_path / "out", "old"))
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "result":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), artifact.staged(tmp_path / "out") as scratch:
        artifact.publish(result(scratch / "result"), tmp_path / "out")
    assert content_of(tmp_path / "out") == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_and_an_earlier_result_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result(tmp_path / "ours")
    for name in ("empty", "ours", "not-there-yet"):
        artifact.check_output(tmp_path / name)


def test_a_folder_with_other_files_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="holds other files"):
        artifact.check_output(tmp_path)
    with pytest.raises(OutputError, match="is not a folder"):
        artifact.check_output(tmp_path / "notes.txt")


def test_the_same_graph_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        model = ir.from_onnx_text(TEXT)
        model.graph.node(0).metadata_props["made by"] = name
        artifact.save_model(model, tmp_path / name)
        contents.append(content_of(tmp_path / name))
    assert contents[0] == contents[1]
    assert list(contents[0]) == ["model.onnx", "model.onnx.data"]
    assert artifact.size_of(tmp_path / "first") == sum(map(len, contents[0].values()))
    feed: Feed = {"x": np.zeros((1, 2), dtype=np.float32), "n": np.zeros(1, dtype=np.int64)}
    np.testing.assert_array_equal(Session(tmp_path / "first" / "model.onnx").run(feed)["y"], [[1.0, 2.0]])


def test_json_is_written_with_sorted_keys(tmp_path: Path) -> None:
    artifact.write_json(tmp_path / "a.json", {"b": 1, "a": {"d": 2, "c": 3}})
    artifact.write_json(tmp_path / "b.json", {"a": {"c": 3, "d": 2}, "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": {"c": 3, "d": 2}, "b": 1}


@pytest.mark.parametrize("content", [None, "", "{", '{"cut": '])
def test_a_record_that_is_missing_or_broken_is_one_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "scalefold.json").write_text(content, encoding="utf-8")
    with pytest.raises(
        OutputError, match=r"no readable scalefold.json .*; give a folder that `scalefold compile` wrote"
    ):
        artifact.read_record(tmp_path)


def test_the_manifest_of_a_foreign_graph_lists_inputs_and_outputs_by_name() -> None:
    found = artifact.manifest(ir.from_onnx_text(TEXT))
    component = found["components"]["model"]
    assert component["file"] == "model.onnx"
    assert component["metadata"]["kwargs"] == {"x": {"rank": 2, "dtype": "float32"}, "n": {"rank": 1, "dtype": "int64"}}
    version, outputs = json.loads(component["metadata"]["out_spec"])
    assert (version, json.loads(outputs["context"])) == (1, ["y"])
    version, arguments = json.loads(component["metadata"]["in_spec"])
    assert json.loads(arguments["children_spec"][1]["context"]) == ["x", "n"]


PARTS = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
model (uint8[b, t, 32] q, int64[b, t] ids, float[b, t, 6] f) => (float[b, t, 6] y, float[b, t, 32] e, float[b, t, 6] h)
<float s = {0.02}, uint8 z = {100}, int8[1, 1] codes = {0}, float[1] scales = {1.0}, float[1, 1] table = {0.0},
 float[6] c = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[1, 1] w = {0.0}>
{ y = com.microsoft.MatMulIntegerToFloat(q, codes, s, scales, z)  e = Gather(table, ids)
  p = MatMul(f, w)  h = Add(p, c) }"""


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_parts_of_a_file_are_read_from_its_constants(bits: int, tmp_path: Path) -> None:
    rng, wanted = np.random.default_rng(1), WeightFormat(bits=bits, format="kmeans" if bits < 8 else "linear")
    model = ir.from_onnx_text(PARTS)
    product, gather, other = (graph.nodes(model, name)[0] for name in ("MatMulIntegerToFloat", "Gather", "MatMul"))
    integers, scales, coded = quantized(rng.standard_normal((32, 6)).astype(np.float32), wanted, None, 8, "fc")
    codes = graph.replace_constant(model, product, 1, "fc.codes", integers)
    graph.replace_constant(model, product, 3, "fc.scales", scales)
    graph.replace_constant(model, other, 1, "float.weight", np.ones((6, 6), dtype=np.float32))
    graph.replace_constant(model, gather, 0, "rows", rng.standard_normal((200, 32)).astype(np.float32))
    if coded is not None:
        remember(codes, coded)
    QuantizeEmbeddings(WeightFormat(bits=max(bits, 2))).run(model, Context())
    PackWeights().run(model, Context())
    artifact.save_model(model, tmp_path)

    found = artifact.parts(tmp_path)
    table = found["embeddings"]
    assert (table.elements, table.code_bytes) == (200 * 32, 200 * 32 * max(bits, 2) // 8)
    assert 200 * 4 <= table.overhead_bytes <= 200 * 4 + 2 * 200 + 100
    assert found["linear"].elements == 32 * 6 + 6 * 6
    assert found["linear"].code_bytes == 32 * 6 * bits // 8 + 4 * 6 * 6
    assert found["linear"].overhead_bytes >= 6 * 4 + (2**bits if bits < 8 else 0)
    assert sum(part.code_bytes + part.overhead_bytes for part in found.values()) == artifact.size_of(tmp_path)
    assert table.bits_per_element == 8 * (table.code_bytes + table.overhead_bytes) / (200 * 32)


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    result(big / "out", "old")
    link = tmp_path / "out"
    link.symlink_to(big / "out")
    with artifact.staged(link) as scratch:
        assert scratch.parent == big
        artifact.publish(result(scratch / "result"), link)
    assert link.is_symlink() and (big / "out" / "model.onnx").read_text(encoding="utf-8") == "new"
    assert [path.name for path in big.iterdir()] == ["out"]


def test_a_mounted_disk_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(OutputError, match=r"a disk is mounted there, .*; give a folder below it"):
        artifact.check_output(tmp_path)
    artifact.check_output(tmp_path / "below")


def test_a_place_is_known_by_the_files_that_are_ours(tmp_path: Path) -> None:
    (tmp_path / "learning.pt").touch()
    artifact.check_output(tmp_path, "learning.pt")
    with pytest.raises(OutputError, match="the folder holds other files, and nothing was written"):
        artifact.check_output(tmp_path)

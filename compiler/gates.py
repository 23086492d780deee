"""Properties that a compiled model must have whatever it was compiled from: gates that a release can stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, saturation
from scalefold.compiler.calibrate import padding_mask
from scalefold.compiler.decoder import LOGITS, TOKEN_FEEDS, Decoder, decoder_of, is_decoder, is_fixed
from scalefold.compiler.errors import KernelError
from scalefold.compiler.facts import weight_array
from scalefold.compiler.runtime import Array, Feed, Session

STATIC_LIMIT = 1e-3
"""Largest difference, as a share of the largest output: float additions in another order. An output below 1 counts as 1."""

ROWS_LIMIT = 2e-2
"""The same where rows are rounded by their own extremes, and that can turn one code into its neighbour."""

PARITY_TOKENS = 64
BATCH = 8
REMEDIES = {"no saturation": "compile it from its float model; scalefold's weights cannot saturate"}
CODES_INPUT = {"MatMulIntegerToFloat": 1, "QGemm": 3, "DequantizeLinear": 0}


@dataclass(frozen=True)
class Gate:
    """One property, and whether it holds.

    Attributes:
        name: the property.
        passed: whether it holds.
        figure: what was measured.
        limit: the largest figure that passes.
        detail: what the figure is, and of what.
    """

    name: str
    passed: bool
    figure: float
    limit: float
    detail: str


def run_gates(model: ir.Model, session: Session, feed: Feed, *, rounds_rows: bool) -> list[Gate]:
    """Every gate that applies to a compiled model.

    Args:
        model: the graph as it was written.
        session: an open session of it.
        feed: a sample of one sequence.
        rounds_rows: whether any layer's input is rounded by what is in each row.
    """
    limit = ROWS_LIMIT if rounds_rows else STATIC_LIMIT
    found = [no_saturation(model)]
    ids = feed.get("input_ids")
    if ids is None or ids.ndim != 2:
        return found
    if is_decoder(model):
        decoder = decoder_of(model)
        ids = ids[:1, :PARITY_TOKENS]
        if not is_fixed(model, 1):
            found.append(cache_parity(session, decoder, ids, limit))
        ids = ids[:, : _room(ids.shape[1])]
        batches = bool(ids.size) and "attention_mask" in decoder.tokens and not is_fixed(model, 0, 1)
        return [*found, *batch_invariance(session, decoder.prompt_feed(ids), limit, decoder)] if batches else found
    mask = padding_mask(feed)
    length = _room(int(mask[0].sum()) if mask is not None else ids.shape[1])
    alone = {name: array[:1, :length] for name, array in feed.items() if name in TOKEN_FEEDS and array.ndim == 2}
    known = len(alone) == len(feed) and "attention_mask" in alone
    batches = known and length > 0 and not is_fixed(model, 0, 1)
    return [*found, *batch_invariance(session, alone, limit)] if batches else found


def _room(length: int) -> int:
    """How many of so many tokens leave room for the padding of a batch: a model may have positions for no more."""
    return length * 8 // 9


def require_gates(gates: Sequence[Gate], where: str) -> None:
    """Raise a KernelError that names the first gate that does not hold, and counts the others."""
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        first, more = failed[0], f" (and {len(failed) - 1} other gates)" if len(failed) > 1 else ""
        raise KernelError(
            f"{first.name} does not hold: {first.detail}, {first.figure:.2g} where {first.limit:g} is allowed{more}",
            where=where,
            remedy=REMEDIES.get(first.name.split(",")[0], "compile it again with a static recipe such as w8a8-static"),
        )


def cache_parity(session: Session, decoder: Decoder, ids: Array, limit: float = STATIC_LIMIT) -> Gate:
    """Whether tokens one by one behind a cache give the logits that they give at once.

    Args:
        session: a decoder.
        decoder: what it takes and gives back.
        ids: tokens [1, S].
        limit: largest difference, as a share of the largest logit, that passes.
    """
    whole = session.run(decoder.prompt_feed(ids))[LOGITS]
    outputs = session.run(decoder.prompt_feed(ids[:, :1]))
    largest = float(np.abs(outputs[LOGITS][0, -1] - whole[0, 0]).max())
    for index in range(1, ids.shape[1]):
        outputs = session.run(decoder.prompt_feed(ids[:, index : index + 1], past=decoder.next_cache(outputs)))
        step = np.abs(outputs[LOGITS][0, -1] - whole[0, index]).max()
        largest = float(np.maximum(largest, step))  # carries NaN on, which no limit allows
    return _gate("cache parity", largest, whole, limit, f"{ids.shape[1]} tokens one by one against all at once")


def no_saturation(model: ir.Model) -> Gate:
    """Whether no product of uint8 and int8 pairs can leave 16 bits, on CPUs that add two before they widen.

    Weights are read as they stand in the graph; see docs/decisions/0002.
    """
    layers, columns, seen = [], 0, set()
    for node in graph.nodes(model, *CODES_INPUT):
        codes = node.inputs[CODES_INPUT[node.op_type]]
        array = weight_array(codes)
        if codes is None or codes in seen or array is None or array.dtype != np.int8 or array.ndim != 2:
            continue
        if node.op_type == "DequantizeLinear" and graph.attribute(node, "axis", 1) not in (1, -1):
            continue
        seen.add(codes)
        saturating = saturation.can_saturate(array.astype(np.int8, copy=False))
        columns += saturating
        if saturating:
            layers.append(node.name or codes.name or "")
    where = f", first in {layers[0]}" if layers else ""
    return Gate("no saturation", not columns, columns, 0, f"columns of weights that can saturate int16{where}")


def batch_invariance(
    session: Session, alone: Feed, limit: float = STATIC_LIMIT, decoder: Decoder | None = None
) -> list[Gate]:
    """Whether a sequence gives the same alone and in a batch of longer ones, padded on the right or on the left.

    Args:
        session: a model.
        alone: the feed of one sequence [1, S], without padding.
        limit: largest difference, as a share of the largest output, that passes.
        decoder: what a decoder takes and gives back; other models are padded on the right alone, as they are served.
    """
    wanted = session.run(alone)
    name = LOGITS if decoder is not None else next(iter(wanted))
    length, found = alone["input_ids"].shape[1], []
    for side in ("right", "left") if decoder is not None else ("right",):
        own = session.run(_batch(alone, side, decoder))[name][:1]
        if own.ndim == 3:
            own = own[:, :length] if side == "right" else own[:, -length:]
        largest = float(np.abs(own - wanted[name]).max())
        detail = f"alone against a batch of {BATCH}"
        found.append(_gate(f"batch invariance, padded {side}", largest, wanted[name], limit, detail))
    return found


def _batch(alone: Feed, side: str, decoder: Decoder | None) -> Feed:
    """The sequence first, padded, and others of other tokens that are longer by an eighth, at least by one token."""
    ids = alone["input_ids"]
    length = ids.shape[1]
    longer = length + max(1, length // 8)
    others = np.resize(ids.min() + ids.max() - ids[0], (BATCH - 1, longer))
    for row in range(BATCH - 1):
        others[row] = np.roll(others[row], row + 1)
    before = longer - length if side == "left" else 0
    padded = np.zeros((BATCH, longer), dtype=ids.dtype)
    mask = np.ones((BATCH, longer), dtype=np.int64)
    padded[0, before : before + length], padded[1:] = ids[0], others
    mask[0] = 0
    mask[0, before : before + length] = 1
    if decoder is not None:
        return decoder.prompt_feed(padded, mask)
    feed: dict[str, Array] = {"input_ids": padded, "attention_mask": mask.astype(alone["attention_mask"].dtype)}
    for name in alone.keys() - feed.keys():  # positions, which go on, and the types of the tokens; each row alike
        row = alone[name][0, 0] + np.arange(longer) if name == "position_ids" else alone[name][0]
        feed[name] = np.resize(row, padded.shape).astype(alone[name].dtype)
    return feed


def _gate(name: str, largest: float, outputs: Array, limit: float, detail: str) -> Gate:
    share = largest / max(1.0, float(np.abs(outputs).max()))
    return Gate(name, share <= limit, share, limit, detail)

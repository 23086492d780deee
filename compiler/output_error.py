"""How far the results of a model are from those of its float model, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler.calibrate import padding_mask, rows_of
from scalefold.compiler.decoder import LOGITS, cache_pairs, divergence, is_decoder
from scalefold.compiler.runtime import Array, Feed, Session, inputs_of
from scalefold.compiler.schemes import Float

Errors = npt.NDArray[np.float64]


class OutputError:
    """The error of one output against the float model's, on a few feeds.

    Of a decoder it is the Kullback-Leibler divergence of the logits, in nats; of other models 1 - cosine of the first
    output. Both grow with the square of small disturbances, so that those of independent ones add up.

    Args:
        model: the float model.
        feeds: the samples.
        stride: of a decoder, compare the logits of every n-th token: each is as wide as the vocabulary.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Feed], stride: int = 4) -> None:
        names = [value.name or "" for value in model.graph.outputs]
        cache = set(cache_pairs(inputs_of(model), names).values())
        results = [name for name in names if name not in cache]
        self._decoder = is_decoder(model) and LOGITS in results
        self._stride = stride if self._decoder else 1
        self.output = LOGITS if self._decoder else results[0]
        self.measure = "divergence of the logits in nats" if self._decoder else f"1 - cosine of {self.output}"
        self.feeds = feeds
        session = Session(model, outputs=[self.output], lean=True)
        self._wanted = [self._result(session, feed) for feed in feeds]

    def mean(self, session: Session, extra: Mapping[str, Array] | None = None) -> float:
        """Mean error per token over all feeds; `extra` is fed besides."""
        return float(np.concatenate([self.of(session, index, extra) for index in range(len(self.feeds))]).mean())

    def of(self, session: Session, index: int, extra: Mapping[str, Array] | None = None) -> Errors:
        """The error of each token of one feed."""
        wanted, got = self._wanted[index], self._result(session, {**self.feeds[index], **(extra or {})})
        if self._decoder:
            return np.array([divergence(wanted[row : row + 1], got[row : row + 1]) for row in range(len(wanted))])
        first, second = wanted.astype(np.float64), got.astype(np.float64)
        norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
        return np.asarray(1 - np.einsum("tc,tc->t", first, second) / np.maximum(norms, 1e-30))

    def _result(self, session: Session, feed: Feed) -> Float:
        return rows_of(session.run(feed)[self.output], padding_mask(feed))[:: self._stride].copy()

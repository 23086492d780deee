"""The passes, and the one place where they are put in order."""

from __future__ import annotations

from scalefold.compiler.protocol import Pass, Pipeline
from scalefold.compiler.recipe import Recipe, Target
from scalefold.passes.bake_prefix import BakePrefix
from scalefold.passes.clip_ranges import ClipRanges
from scalefold.passes.fit_activations import FitActivations
from scalefold.passes.fold_shift import FoldShift
from scalefold.passes.fuse_attention import FuseAttention
from scalefold.passes.insert_qdq import InsertQdq
from scalefold.passes.lower_integer_matmul import LowerIntegerMatmul
from scalefold.passes.migrate_outliers import MigrateOutliers
from scalefold.passes.name_layers import NameLayers
from scalefold.passes.normalize_linear import NormalizeLinear
from scalefold.passes.quantize_bias import QuantizeBias
from scalefold.passes.quantize_embeddings import QuantizeEmbeddings
from scalefold.passes.quantize_weights import QuantizeWeights
from scalefold.passes.recover_gelu import RecoverGelu
from scalefold.passes.recover_layer_norm import RecoverLayerNorm
from scalefold.passes.recover_rms_norm import RecoverRmsNorm
from scalefold.passes.share_weights import ShareWeights
from scalefold.passes.shield_layer_norm import ShieldLayerNorm
from scalefold.passes.tie_embeddings import TieEmbeddings
from scalefold.passes.unflatten_tokens import UnflattenTokens

NORMALIZE: tuple[Pass, ...] = (
    RecoverLayerNorm(),
    RecoverRmsNorm(),
    RecoverGelu(),
    NormalizeLinear(),
    UnflattenTokens(),
    ShareWeights(),
    NameLayers(),
)
LOWER: dict[Target, tuple[Pass, ...]] = {
    "onnxruntime-cpu": (FuseAttention(), FoldShift(), LowerIntegerMatmul(), ShieldLayerNorm()),
    "qdq": (QuantizeBias(),),
}


def pipeline(recipe: Recipe) -> Pipeline:
    """The passes of a recipe, in order."""
    return Pipeline(NORMALIZE, _transform(recipe), _quantize(recipe), LOWER[recipe.target])


def _transform(recipe: Recipe) -> tuple[Pass, ...]:
    prefix, migration = recipe.prefix, recipe.migration
    passes: list[Pass] = []
    if prefix is not None:
        passes.append(BakePrefix(prefix.candidates, prefix.reduction))
    if migration is not None:
        passes.append(
            MigrateOutliers(
                weight_bits=recipe.weights.bits,
                activation_bits=recipe.activations.bits,
                shift=migration.shift,
                scale=migration.scale,
                grid=migration.grid,
                stride=migration.stride,
                norm=migration.norm,
                linear=migration.linear,
                value=migration.value,
                relu=migration.relu,
                gate=migration.gate,
            )
        )
    return tuple(passes)


def _quantize(recipe: Recipe) -> tuple[Pass, ...]:
    activations = recipe.activations
    passes: list[Pass] = []
    if recipe.embeddings is not None and recipe.embeddings.bits == recipe.weights.bits:
        passes.append(TieEmbeddings(recipe.weights.bits, activations.bits, recipe.include, recipe.exclude))
    passes += [
        QuantizeWeights(recipe.weights.bits, activations.bits, recipe.include, recipe.exclude),
        InsertQdq(activations.bits, activations.granularity, activations.per_token),
    ]
    if activations.clipping:
        passes.append(
            ClipRanges(activations.clipping, activations.clipping_step, activations.bits, activations.clipping_refine)
        )
        passes.append(_fitted(recipe))
    if recipe.embeddings is not None:
        passes.append(QuantizeEmbeddings(bits=recipe.embeddings.bits))
    return tuple(passes)


def _fitted(recipe: Recipe) -> FitActivations:
    exceptions = recipe.exceptions
    if exceptions is None:
        return FitActivations(bits=recipe.activations.bits)
    return FitActivations(recipe.activations.bits, exceptions.divergence, exceptions.per_token_share)

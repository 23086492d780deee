"""The passes, and the one place where they are put in order."""

from __future__ import annotations

from scalefold.compiler.protocol import Pass, Pipeline
from scalefold.compiler.recipe import Recipe, Target
from scalefold.passes.clip_ranges import ClipRanges
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
from scalefold.passes.shield_layer_norm import ShieldLayerNorm

NORMALIZE: tuple[Pass, ...] = (RecoverLayerNorm(), RecoverGelu(), NormalizeLinear(), NameLayers())
LOWER: dict[Target, tuple[Pass, ...]] = {
    "onnxruntime-cpu": (FuseAttention(), FoldShift(), LowerIntegerMatmul(), ShieldLayerNorm()),
    "qdq": (QuantizeBias(),),
}


def pipeline(recipe: Recipe) -> Pipeline:
    """The passes of a recipe, in order."""
    return Pipeline(NORMALIZE, _transform(recipe), _quantize(recipe), LOWER[recipe.target])


def _transform(recipe: Recipe) -> tuple[Pass, ...]:
    migration = recipe.migration
    if migration is None:
        return ()
    return (
        MigrateOutliers(
            weight_bits=recipe.weights.bits,
            activation_bits=recipe.activations.bits,
            shift=migration.shift,
            scale=migration.scale,
            grid=migration.grid,
            stride=migration.stride,
        ),
    )


def _quantize(recipe: Recipe) -> tuple[Pass, ...]:
    activations = recipe.activations
    passes: list[Pass] = [
        QuantizeWeights(recipe.weights.bits, activations.bits, recipe.include, recipe.exclude),
        InsertQdq(bits=activations.bits),
    ]
    if activations.clipping:
        passes.append(
            ClipRanges(activations.clipping, activations.clipping_step, activations.bits, activations.clipping_refine)
        )
    if recipe.embeddings is not None:
        passes.append(QuantizeEmbeddings(bits=recipe.embeddings.bits))
    return tuple(passes)

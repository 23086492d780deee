"""The passes, and the one place where they are put in order."""

from __future__ import annotations

from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Pass, Pipeline
from scalefold.compiler.recipe import Activations, Exceptions, Recipe, Target
from scalefold.compiler.user_pass import BY_CONTRACT
from scalefold.passes.bake_prefix import BakePrefix
from scalefold.passes.clip_ranges import ClipRanges
from scalefold.passes.fit_activations import FitActivations
from scalefold.passes.fold_shift import FoldShift
from scalefold.passes.fuse_attention import FuseAttention
from scalefold.passes.fuse_decoder import FuseDecoder
from scalefold.passes.fuse_kernels import FuseKernels
from scalefold.passes.fuse_norms import FuseNorms
from scalefold.passes.insert_qdq import InsertQdq
from scalefold.passes.learn_scales import LearnScales
from scalefold.passes.lower_block_matmul import LowerBlockMatmul
from scalefold.passes.lower_integer_matmul import LowerIntegerMatmul
from scalefold.passes.merge_expands import MergeExpands
from scalefold.passes.merge_projections import MergeProjections
from scalefold.passes.migrate_outliers import MigrateOutliers
from scalefold.passes.name_layers import NameLayers
from scalefold.passes.normalize_linear import NormalizeLinear
from scalefold.passes.pack_weights import PackWeights
from scalefold.passes.quantize_bias import QuantizeBias
from scalefold.passes.quantize_cache import QuantizeCache
from scalefold.passes.quantize_embeddings import QuantizeEmbeddings
from scalefold.passes.quantize_weights import QuantizeWeights
from scalefold.passes.recover_gelu import RecoverGelu
from scalefold.passes.recover_layer_norm import RecoverLayerNorm
from scalefold.passes.recover_rms_norm import RecoverRmsNorm
from scalefold.passes.recover_rotary import RecoverRotary
from scalefold.passes.share_weights import ShareWeights
from scalefold.passes.shield_layer_norm import ShieldLayerNorm
from scalefold.passes.split_attention import SplitAttention
from scalefold.passes.tie_embeddings import TieEmbeddings
from scalefold.passes.unflatten_tokens import UnflattenTokens
from scalefold.passes.unmerge_heads import UnmergeHeads

NORMALIZE: tuple[Pass, ...] = (
    RecoverLayerNorm(),
    RecoverRmsNorm(),
    RecoverGelu(),
    NormalizeLinear(),
    UnflattenTokens(),
    ShareWeights(),
    NameLayers(),
)
SEARCHED_BITS = 6
"""Fewest weight bits that migration searches with: it rounds to the nearest, and solvers for fewer bits do better."""

ATTENTION: tuple[Pass, ...] = (RecoverRotary(), UnmergeHeads(), FuseAttention())
"""How attention is written for onnxruntime, whether it is to be run from then on or only to be measured."""

LOWER: dict[Target, tuple[Pass, ...]] = {
    "onnxruntime-cpu": (
        *ATTENTION,
        MergeExpands(),
        FoldShift(),
        LowerIntegerMatmul(),
        ShieldLayerNorm(),
    ),
    "qdq": (QuantizeBias(),),
}

FUSE: tuple[Pass, ...] = (FuseDecoder(), FuseKernels(), FuseNorms())
"""What `scalefold fuse` does to a graph that was lowered for onnxruntime-cpu."""


def pipeline(recipe: Recipe) -> Pipeline:
    """The passes of a recipe, in order."""
    return Pipeline(NORMALIZE, _transform(recipe), _quantize(recipe), _lower(recipe), ATTENTION)


def _transform(recipe: Recipe) -> tuple[Pass, ...]:
    prefix, migration, activations = recipe.prefix, recipe.migration, recipe.activations
    passes = _user_passes(recipe, "before-migration")
    if prefix is not None:
        passes.append(BakePrefix(prefix.candidates, prefix.reduction))
    if migration is not None and activations is not None:
        passes.append(
            MigrateOutliers(
                weight_bits=max(recipe.weights.bits, SEARCHED_BITS),
                activation_bits=activations.bits,
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
    passes += _learning(recipe)
    per_token = () if activations is None else activations.per_token
    merge = MergeProjections(recipe.weights, (*recipe.include, *recipe.exclude, *per_token))
    return (*passes, *_user_passes(recipe, "before-quantization"), merge)


def _learning(recipe: Recipe) -> list[Pass]:
    """Behind migration, where both are wanted: scales are then learned on from those that were searched."""
    learning, activations = recipe.learning, recipe.activations
    if learning is None or activations is None:
        return []
    options = learning.model_dump()
    return [
        LearnScales(
            weight_bits=max(recipe.weights.bits, SEARCHED_BITS),
            activation_bits=activations.bits,
            include=recipe.include,
            exclude=recipe.exclude,
            **options,
        )
    ]


def _user_passes(recipe: Recipe, place: str) -> list[Pass]:
    """The user's functions at a place, and what brings layers back into normal form behind them."""
    found: list[Pass] = [
        BY_CONTRACT[entry.contract](entry.function, entry.takes) for entry in recipe.user_passes if entry.place == place
    ]
    return [*found, NormalizeLinear()] if found else []


def _quantize(recipe: Recipe) -> tuple[Pass, ...]:
    activations, weights = recipe.activations, recipe.weights
    met = None if activations is None else activations.bits
    passes: list[Pass] = []
    if recipe.embeddings is not None:
        passes.append(TieEmbeddings(weights, recipe.embeddings.bits, met, recipe.include, recipe.exclude))
    passes.append(QuantizeWeights(weights, met, recipe.include, recipe.exclude))
    if recipe.profile != "throughput":
        passes.append(LowerBlockMatmul("all" if recipe.profile == "decode" else "measured", recipe.rows))
    if activations is not None:
        passes.append(InsertQdq(activations.bits, activations.granularity, activations.per_token))
        passes += _fitted(activations, recipe.exceptions)
    if recipe.embeddings is not None:
        passes.append(QuantizeEmbeddings(recipe.embeddings.weight))
    if recipe.cache is not None:
        passes.append(QuantizeCache())
    return tuple(passes)


def _fitted(activations: Activations, exceptions: Exceptions | None) -> list[Pass]:
    bits, clipping = activations.bits, activations.clipping
    if not clipping:
        return []
    fit = FitActivations(bits)
    if exceptions is not None:
        fit = FitActivations(
            bits,
            exceptions.divergence,
            exceptions.per_token_share,
            exceptions.float_divergence,
            exceptions.float_share,
            exceptions.two_codes_share,
        )
    return [ClipRanges(clipping, activations.clipping_step, bits, activations.clipping_refine), fit]


def _lower(recipe: Recipe) -> tuple[Pass, ...]:
    passes = LOWER[recipe.target]
    if recipe.activations is None:
        passes = tuple(entry for entry in passes if Fact.QDQ not in entry.requires)
        passes += (LowerBlockMatmul(),) if recipe.target == "onnxruntime-cpu" else ()
    if recipe.attention is not None:
        passes = (*passes, SplitAttention())
    return (*passes, PackWeights()) if recipe.weights.packed else passes

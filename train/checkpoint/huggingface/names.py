"""One table of tensor names per model family; import and export both follow from it.

Ours and theirs differ in names and in how numbers are arranged, never in the numbers: so the table
says which box of our tensor is which box of theirs (`Piece`), and a conversion copies boxes. The
reverse is the same list read from right to left, hence bitwise.

Names below `layers.N.` (ours) stand beside those below the block N of theirs. What needs more than
a name is a cut: experts are stacked here and apart there, the residual map of mHC is transposed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["deepseek_v3", "deepseek_v32", "deepseek_v4"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one of our tensors that is a box of one of theirs."""

    ours: str
    our_start: Shape
    size: Shape
    """Extents in our dims; theirs are the last ones, without the leading dims of extent 1."""
    theirs: str
    their_start: Shape
    duplicate: bool = False
    """Theirs stores a second copy; written on export, compared on import if it is there."""

    @property
    def their_size(self) -> Shape:
        """Extents in their dims."""
        return self.size[len(self.size) - len(self.their_start) :]


Cut = Callable[[Shape], Iterator[tuple[str, Shape, Shape, Shape]]]
"""Shape of our tensor -> (their name, our start, size, their start) of each piece."""


def whole(theirs: str) -> Cut:
    """The same tensor under another name."""

    def cut(shape: Shape) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        zeros = (0,) * len(shape)
        yield theirs, zeros, shape, zeros

    return cut


def per_expert(*theirs: str) -> Cut:
    """Matrices stacked on dim 0 here; one per expert there, whose rows may be in several."""

    def cut(shape: Shape) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        experts, rows, columns = shape
        part = rows // len(theirs)
        for expert in range(experts):
            for index, name in enumerate(theirs):
                start = (expert, index * part, 0)
                yield name.format(expert=expert), start, (1, part, columns), (0, 0)

    return cut


def halves_exchanged(theirs: str) -> Cut:
    """The two halves of the columns change places."""

    def cut(shape: Shape) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        rows, columns = shape
        for here, there in ((0, columns // 2), (columns // 2, 0)):
            yield theirs, (0, here), (rows, columns // 2), (0, there)

    return cut


def residual_transposed(theirs: str) -> Cut:
    """Rows of an mHC site: those of pre and post, then n x n of the residual map, transposed."""

    def cut(shape: Shape) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        n = next(n for n in range(shape[0]) if n * (n + 2) == shape[0])
        rest, zeros = shape[1:], (0,) * (len(shape) - 1)
        yield theirs, (0, *zeros), (2 * n, *rest), (0, *zeros)
        for row in range(n):
            for column in range(n):
                here, there = (2 * n + n * i + j for i, j in ((row, column), (column, row)))
                yield theirs, (here, *zeros), (1, *rest), (there, *zeros)

    return cut


_BLOCK_V3: Mapping[str, Cut] = {
    "attention_norm.weight": whole("input_layernorm.weight"),
    "ffn_norm.weight": whole("post_attention_layernorm.weight"),
    # Rotary channels are neighbouring pairs in both: no permutation.
    "attention.q.weight": whole("self_attn.q_proj.weight"),
    "attention.q_a.weight": whole("self_attn.q_a_proj.weight"),
    "attention.q_a_norm.weight": whole("self_attn.q_a_layernorm.weight"),
    "attention.q_b.weight": whole("self_attn.q_b_proj.weight"),
    "attention.kv_a.weight": whole("self_attn.kv_a_proj_with_mqa.weight"),
    "attention.kv_a_norm.weight": whole("self_attn.kv_a_layernorm.weight"),
    "attention.kv_b.weight": whole("self_attn.kv_b_proj.weight"),
    "attention.o.weight": whole("self_attn.o_proj.weight"),
    "ffn.gate.weight": whole("mlp.gate_proj.weight"),
    "ffn.up.weight": whole("mlp.up_proj.weight"),
    "ffn.down.weight": whole("mlp.down_proj.weight"),
    "ffn.router.weight": whole("mlp.gate.weight"),
    "ffn.router.expert_bias": whole("mlp.gate.e_score_correction_bias"),
    "ffn.experts.gate_up": per_expert(
        "mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"
    ),
    "ffn.experts.down": per_expert("mlp.experts.{expert}.down_proj.weight"),
    "ffn.shared.gate.weight": whole("mlp.shared_experts.gate_proj.weight"),
    "ffn.shared.up.weight": whole("mlp.shared_experts.up_proj.weight"),
    "ffn.shared.down.weight": whole("mlp.shared_experts.down_proj.weight"),
}
_BLOCK_V32: Mapping[str, Cut] = {
    **_BLOCK_V3,
    # Rotary channels are two halves in both.
    "attention.indexer.q_b.weight": whole("self_attn.indexer.wq_b.weight"),
    "attention.indexer.k.weight": whole("self_attn.indexer.wk.weight"),
    "attention.indexer.k_norm.weight": whole("self_attn.indexer.k_norm.weight"),
    "attention.indexer.k_norm.bias": whole("self_attn.indexer.k_norm.bias"),
    "attention.indexer.head_weights.weight": whole("self_attn.indexer.weights_proj.weight"),
}
_MTP_V3: Mapping[str, Cut] = {
    "embedding_norm.weight": whole("enorm.weight"),
    "hidden_norm.weight": whole("hnorm.weight"),
    # Ours projects [hidden ; embedding], theirs [embedding ; hidden].
    "project.weight": halves_exchanged("eh_proj.weight"),
    "norm.weight": whole("shared_head.norm.weight"),
}


def _compressor(ours: str, theirs: str) -> dict[str, Cut]:
    """Channels of overlapping entries are ordered alike: those for the next block come first."""
    return {
        f"{ours}.kv.weight": whole(f"{theirs}.wkv.weight"),
        f"{ours}.gate.weight": whole(f"{theirs}.wgate.weight"),
        f"{ours}.pool.logits": whole(f"{theirs}.ape"),
        f"{ours}.norm.weight": whole(f"{theirs}.norm.weight"),
    }


def _site(ours: str, theirs: str) -> dict[str, Cut]:
    return {
        f"{ours}.phi": residual_transposed(f"{theirs}_fn"),
        f"{ours}.bias": residual_transposed(f"{theirs}_base"),
        f"{ours}.alpha": whole(f"{theirs}_scale"),
    }


_READ_OUT_V4: Mapping[str, Cut] = {
    "read_out.phi": whole("hc_head_fn"),
    "read_out.bias": whole("hc_head_base"),
    "read_out.alpha": whole("hc_head_scale"),
}
_BLOCK_V4: Mapping[str, Cut] = {
    **_site("attention_site", "hc_attn"),
    "attention_norm.weight": whole("attn_norm.weight"),
    "attention.q_a.weight": whole("attn.wq_a.weight"),
    "attention.q_a_norm.weight": whole("attn.q_norm.weight"),
    "attention.q_b.weight": whole("attn.wq_b.weight"),
    "attention.kv.weight": whole("attn.wkv.weight"),
    "attention.kv_norm.weight": whole("attn.kv_norm.weight"),
    "attention.sink.logits": whole("attn.attn_sink"),
    "attention.o_a.weight": whole("attn.wo_a.weight"),
    "attention.o_b.weight": whole("attn.wo_b.weight"),
    **_compressor("attention.compressor", "attn.compressor"),
    "attention.indexer.q_b.weight": whole("attn.indexer.wq_b.weight"),
    "attention.indexer.head_weights.weight": whole("attn.indexer.weights_proj.weight"),
    **_compressor("attention.indexer.compressor", "attn.indexer.compressor"),
    **_site("ffn_site", "hc_ffn"),
    "ffn_norm.weight": whole("ffn_norm.weight"),
    "ffn.router.weight": whole("ffn.gate.weight"),
    "ffn.router.expert_bias": whole("ffn.gate.bias"),
    "ffn.router.expert_table": whole("ffn.gate.tid2eid"),
    "ffn.experts.gate_up": per_expert(
        "ffn.experts.{expert}.w1.weight", "ffn.experts.{expert}.w3.weight"
    ),
    "ffn.experts.down": per_expert("ffn.experts.{expert}.w2.weight"),
    "ffn.shared.gate.weight": whole("ffn.shared_experts.w1.weight"),
    "ffn.shared.up.weight": whole("ffn.shared_experts.w3.weight"),
    "ffn.shared.down.weight": whole("ffn.shared_experts.w2.weight"),
}
_MTP_V4: Mapping[str, Cut] = {
    "embedding_norm.weight": whole("enorm.weight"),
    "hidden_norm.weight": whole("hnorm.weight"),
    "embedding_project.weight": whole("e_proj.weight"),
    "hidden_project.weight": whole("h_proj.weight"),
    "norm.weight": whole("norm.weight"),
    **_READ_OUT_V4,
}


@dataclass(frozen=True, kw_only=True)
class _Names:
    """The names of a family, as DeepSeek publishes it."""

    outer: Mapping[str, Cut]
    layer: str
    """Prefix of block number {index}."""
    block: Mapping[str, Cut]
    mtp_layer: str
    """Prefix of the MTP block number {depth}, which follows the others as number {index}."""
    mtp: Mapping[str, Cut]
    mtp_copies: Mapping[str, str]
    """Our outer tensors that are stored once more below the MTP block."""
    spellings: tuple[tuple[str, str], ...] = ()
    """Patterns of transformers' own spelling -> what stands here instead."""


_V3 = _Names(
    outer={
        "embedding.weight": whole("model.embed_tokens.weight"),
        "norm.weight": whole("model.norm.weight"),
        "head.weight": whole("lm_head.weight"),
    },
    layer="model.layers.{index}.",
    block=_BLOCK_V3,
    mtp_layer="model.layers.{index}.",
    mtp=_MTP_V3,
    mtp_copies={
        "embedding.weight": "embed_tokens.weight",
        "head.weight": "shared_head.head.weight",
    },
)
_NAMES: Mapping[Family, _Names] = {
    "deepseek_v3": _V3,
    "deepseek_v32": replace(_V3, block=_BLOCK_V32),
    "deepseek_v4": _Names(
        outer={
            "embedding.weight": whole("embed.weight"),
            "norm.weight": whole("norm.weight"),
            "head.weight": whole("head.weight"),
            **_READ_OUT_V4,
        },
        layer="layers.{index}.",
        block=_BLOCK_V4,
        mtp_layer="mtp.{depth}.",
        mtp=_MTP_V4,
        mtp_copies={},
        # What save_pretrained writes: a part of the names is theirs, a part its own.
        spellings=(
            (r"^model\.", ""),
            (r"^embed_tokens\.", "embed."),
            (r"^lm_head\.", "head."),
            (r"^hc_head\.hc_", "hc_head_"),
            (r"\.attn\.norm\.", ".attn.kv_norm."),
        ),
    ),
}
_FP32 = (
    *("e_score_correction_bias", "gate.bias", "indexer.k_norm.weight", "indexer.k_norm.bias"),
    *("self_attn.indexer.weights_proj.weight", "attn_sink", "ape"),
    *("_fn", "_base", "_scale"),
)
"""Endings of their names that stay fp32 when the rest is rounded to bf16, as in DeepSeek's code."""


def pieces(family: Family, num_layers: int, shapes: Mapping[str, Shape]) -> list[Piece]:
    """The boxes that a model consists of, in the order of `shapes`; every number is in one piece.

    Args:
        family: whose names.
        num_layers: blocks without MTP, whose block follows them in theirs.
        shapes: of our parameters and persistent buffers, by name.

    Raises:
        KeyError: a tensor has no counterpart; the rules of `config` refuse such models by name.
    """
    found, names = [], _NAMES[family]
    for name, shape in shapes.items():
        prefix, cut = _lookup(names, num_layers, name)
        for theirs, our_start, size, their_start in cut(shape):
            found.append(Piece(name, our_start, size, prefix + theirs, their_start))
    for name, theirs in names.mtp_copies.items():
        if any(ours.startswith("mtp.") for ours in shapes):
            zeros = (0,) * len(shapes[name])
            copy = names.mtp_layer.format(index=num_layers, depth=0) + theirs
            found.append(Piece(name, zeros, shapes[name], copy, zeros, duplicate=True))
    return found


def their_shapes(found: Sequence[Piece]) -> dict[str, Shape]:
    """Shapes of their tensors: as far as the pieces reach."""
    shapes: dict[str, Shape] = {}
    for piece in found:
        ends = zip(piece.their_start, piece.their_size, strict=True)
        end = tuple(start + size for start, size in ends)
        shapes[piece.theirs] = tuple(map(max, shapes.get(piece.theirs, end), end))
    return shapes


def published_name(family: Family, name: str) -> str:
    """The name as DeepSeek publishes it, from what transformers may have made of it."""
    for pattern, published in _NAMES[family].spellings:
        name = re.sub(pattern, published, name)
    return name


def has_mtp(family: Family, num_layers: int, theirs: Iterable[str]) -> bool:
    """Whether a folder with these tensors holds a block of multi-token prediction."""
    prefix = _NAMES[family].mtp_layer.format(index=num_layers, depth=0)
    return any(name.startswith(prefix) for name in theirs)


def keeps_fp32(theirs: str) -> bool:
    """Whether a tensor stays fp32 in a folder whose matrices are bf16."""
    return theirs.endswith(_FP32)


def _lookup(names: _Names, num_layers: int, name: str) -> tuple[str, Cut]:
    """Prefix of their names, and the cut that yields the rest of them."""
    if name.startswith("layers."):
        _, index, local = name.split(".", 2)
        return names.layer.format(index=index), names.block[local]
    if name.startswith("mtp."):
        _, depth, local = name.split(".", 2)
        prefix = names.mtp_layer.format(index=num_layers + int(depth), depth=depth)
        inner = local.removeprefix("block.")
        return prefix, names.mtp[local] if inner == local else names.block[inner]
    return "", names.outer[name]

"""Exact n-gram hashing of Engram (arXiv 2601.07372, section 2 and its released code).

`engram` asks for the table rows of a batch; `train.build` compresses the tokenizer's vocabulary.
Row numbers depend on token ids, the geometry and the seed only, so every rank, a prefetching
loader and an inference engine agree on them bit for bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from tokenizers import Regex, normalizers
from torch import Tensor, nn

from train.model.config import EngramConfig

_LAYER_PRIME = 10007
_LONE_SPACE = "\ue000"


@dataclass(frozen=True, kw_only=True)
class HashGeometry:
    """Constants of one layer's hash."""

    layer: int
    moduli: tuple[tuple[int, ...], ...]
    """Prime rows of each head, by order; all distinct over the whole model."""

    @property
    def offsets(self) -> list[int]:
        """First row of each (order, head) in the layer's flat table."""
        flat = [modulus for heads in self.moduli for modulus in heads]
        return [sum(flat[:i]) for i in range(len(flat))]

    @property
    def num_rows(self) -> int:
        """Rows of the layer's flat table."""
        return sum(map(sum, self.moduli))


def hash_geometries(config: EngramConfig) -> dict[int, HashGeometry]:
    """Constants of every Engram layer, by layer index.

    Moduli are the primes from `rows_per_head` upwards that no earlier layer, order or head has
    taken.
    """
    taken: set[int] = set()
    geometries = {}
    for layer in config.layers:
        moduli = tuple(
            tuple(_next_prime(config.rows_per_head, taken) for _ in range(config.num_heads))
            for _ in config.ngram_orders
        )
        geometries[layer] = HashGeometry(layer=layer, moduli=moduli)
    return geometries


def hash_multipliers(config: EngramConfig, layer: int, vocab_size: int) -> list[int]:
    """Odd factor of the token that stands i places back, for i below the highest order.

    `2 r + 1` with r from numpy's generator seeded with `seed + 10007 * layer`, below
    (2^63 - 1) / vocab_size / 2, so that products stay positive.

    Args:
        config: seed and orders.
        layer: index of the layer.
        vocab_size: number of different ids that are hashed: of the compressed vocabulary.
    """
    generator = np.random.default_rng(config.seed + _LAYER_PRIME * layer)
    bound = max(1, (2**63 - 1) // vocab_size // 2)
    drawn = generator.integers(0, bound, size=max(config.ngram_orders), dtype=np.int64)
    return [int(r) * 2 + 1 for r in drawn]


def _next_prime(lowest: int, taken: set[int]) -> int:
    """The smallest prime >= `lowest` outside `taken`; it is added to `taken`."""
    candidate = lowest
    while candidate in taken or not _is_prime(candidate):
        candidate += 1
    taken.add(candidate)
    return candidate


def _is_prime(number: int) -> bool:
    """Trial division; numbers here are rows per head, so their roots are small."""
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


class NgramHash(nn.Module):
    """Row numbers of every token's n-grams in the layer's flat table.

    For order n at token t, with compressed ids x: mix = (x_t m_0) XOR (x_{t-1} m_1) XOR ... XOR
    (x_{t-n+1} m_{n-1}); head k reads row `offset + mix mod prime`. All heads of an order share the
    mix. Places before the start of the document hold the pad token.

    Tokens that stand for something else than text, such as image patches, are dead (V4.1): the
    look-back stops at them, and the pad token stands there and further back. A dead token itself
    is hashed as a pad with nothing before it, so all dead tokens read the same rows.

    `token_map` compresses token ids (see `compress_vocabulary`); it starts as the identity. The
    multipliers depend on how many ids are left, as in the released code.
    """

    token_map: Tensor
    multipliers: Tensor
    moduli: Tensor
    offsets: Tensor

    def __init__(
        self,
        config: EngramConfig,
        geometry: HashGeometry,
        vocab_size: int,
        dead_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.dead_token_id = dead_token_id
        self.config = config
        self.orders, self.num_heads = config.ngram_orders, config.num_heads
        self.pad_token_id, self.geometry = config.pad_token_id, geometry
        sizes = {
            "token_map": vocab_size,
            "multipliers": max(self.orders),
            "moduli": len(self.orders) * self.num_heads,
            "offsets": len(self.orders) * self.num_heads,
        }
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.int64), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Write the constants; needed again after a model moves from the meta device."""
        flat = [modulus for heads in self.geometry.moduli for modulus in heads]
        for buffer, values in (
            (self.token_map, range(len(self.token_map))),
            (self.multipliers, self._multipliers(len(self.token_map))),
            (self.moduli, flat),
            (self.offsets, self.geometry.offsets),
        ):
            buffer.copy_(torch.tensor(list(values), dtype=torch.int64, device="cpu"))

    def set_token_map(self, compressed: Int[Tensor, "tokens"]) -> None:
        """Hash `compressed[id]` in place of each token id below the number of values given.

        Raises:
            ValueError: there are more values than tokens in the model's vocabulary.
        """
        if len(compressed) > len(self.token_map):
            raise ValueError(
                f"model.vocab_size={len(self.token_map)}: the tokenizer has {len(compressed)} "
                f"tokens; use {len(compressed)} or more"
            )
        self.token_map[: len(compressed)] = compressed.to(self.token_map.device)
        multipliers = self._multipliers(int(compressed.max()) + 1)
        self.multipliers.copy_(torch.tensor(multipliers, dtype=torch.int64, device="cpu"))

    def _multipliers(self, num_ids: int) -> list[int]:
        return hash_multipliers(self.config, self.geometry.layer, num_ids)

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], document_ids: Int[Tensor, "batch seq"]
    ) -> Int[Tensor, "batch seq columns"]:
        """Rows of the flat table, columns ordered by n-gram order, then head."""
        tokens = self.token_map[input_ids]
        pad = self.token_map[self.pad_token_id]
        spans = document_ids.unsqueeze(-1)
        if self.dead_token_id is not None:
            dead = input_ids == self.dead_token_id
            tokens = torch.where(dead, pad, tokens)
            # The count changes at each dead token, so no look-back crosses one or starts at one.
            spans = torch.stack([document_ids, dead.cumsum(1)], dim=-1)
        mix = tokens * self.multipliers[0]
        mixes = []
        for back in range(1, max(self.orders)):
            earlier = _look_back(tokens, spans, back, pad)
            mix = mix ^ (earlier * self.multipliers[back])
            mixes.append(mix)
        mixed = torch.stack(mixes, dim=-1).repeat_interleave(self.num_heads, dim=-1)
        return mixed % self.moduli + self.offsets


def _look_back(
    tokens: Int[Tensor, "batch seq"],
    spans: Int[Tensor, "batch seq marks"],
    back: int,
    pad: Int[Tensor, ""],
) -> Int[Tensor, "batch seq"]:
    """The token `back` places earlier, or `pad` where that has other marks or is nothing."""
    shifted = pad.expand_as(tokens).clone()
    same = (spans[:, back:] == spans[:, :-back]).all(-1)
    shifted[:, back:] = torch.where(same, tokens[:, :-back], pad)
    return shifted


def compress_vocabulary(decoded_tokens: Sequence[str]) -> NDArray[np.int64]:
    """Map token ids that differ in case, accents, width or white space only to one id.

    The normaliser chain is that of the released code. Text that is no valid UTF-8 on its own
    (U+FFFD), or of which nothing is left, stays as it is.

    Args:
        decoded_tokens: text of each token id, decoded singly.

    Returns:
        Compressed id of each token id, numbered by first appearance.
    """
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            # A token that is only a space means something: keep it through the strip.
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )
    numbers: dict[str, int] = {}
    compressed = []
    for text in decoded_tokens:
        plain = text if "\ufffd" in text else normalizer.normalize_str(text) or text
        compressed.append(numbers.setdefault(plain, len(numbers)))
    return np.array(compressed, dtype=np.int64)

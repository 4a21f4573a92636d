"""Into what chunks the loss cuts the product with a head that does not lie on the device as it is multiplied.

Without torch: what they take is asked before anything is loaded, too.
"""

from __future__ import annotations

from dataclasses import dataclass

# All buffers together. In 8B at 1 x 2048, 48 MiB for gradients in fp32 and targets' rows, 39 for logits of 9,984 words
# and twice 78 for those words' rows of the head: less than what the backward pass of a block needs.
CHUNK_BYTES = 256 * 2**20
_MULTIPLE = 128  # of tokens and of words: tiles of the products


@dataclass(frozen=True)
class ChunkSizes:
    """tokens: for which the head passes once. vocabulary: rows of it that the device holds at a time."""

    tokens: int
    vocabulary: int

    @classmethod
    def within(
        cls, chunk_bytes: int, tokens: int, vocabulary: int, hidden: int, *, value_bytes: int, bytes_a_row: int
    ) -> ChunkSizes:
        """As few passes as half of the bytes allow, and then as many words at a time as the other half does.

        value_bytes: of one in the compute dtype. bytes_a_row: of the device, for each row of the head in a chunk.
        """
        a_token = hidden * (4 + value_bytes)  # gradient in fp32, the target's row
        chosen_tokens = _even(tokens, chunk_bytes // 2 // a_token)
        a_word = chosen_tokens * value_bytes + bytes_a_row  # logits, the head's rows
        return cls(chosen_tokens, _even(vocabulary, (chunk_bytes - chosen_tokens * a_token) // a_word))


def _even(total: int, most: int) -> int:
    """The size of the fewest equal parts of `total` that are `most` at most, up to what tiles want."""
    most = max(_MULTIPLE, most // _MULTIPLE * _MULTIPLE)
    parts = -(-max(total, 1) // most)
    size = -(-max(total, 1) // parts)
    return -(-size // _MULTIPLE) * _MULTIPLE

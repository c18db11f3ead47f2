"""The key/value ring of streaming inference: preallocated, written in place, never concatenated."""

from __future__ import annotations

from torch import Tensor


class Ring:
    """Keys and values (after RoPE) of the last chunks, for every layer.

    Chunk c lives in slot c % slots. The first call brings up to three chunks; then `kv_chunks` past ones
    stay beside the current one. `chunks` lists the cached chunks in time order. Pooled keys are kept
    beside them, so that selection never touches a past token again.
    """

    def __init__(self, kv_chunks: int, layers: int, chunk_tokens: int, per_chunk: int):
        assert kv_chunks >= 2, "the settings of a stream see to it"
        self.kv_chunks = kv_chunks
        self.layers, self.chunk_tokens, self.per_chunk = layers, chunk_tokens, per_chunk
        self.slots = max(kv_chunks + 1, 3)
        self.chunks: list[int] = []
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.pooled: Tensor | None = None

    def _allocate(self, k: Tensor, pooled: Tensor) -> None:
        b, _, heads, d = k.shape
        shape = (self.layers, b, heads, self.slots * self.chunk_tokens, d)
        self.keys, self.values = k.new_zeros(shape), k.new_zeros(shape)
        self.pooled = pooled.new_zeros(*shape[:3], self.slots * self.per_chunk, d)

    def slot(self, chunk: int) -> int:
        return chunk % self.slots

    def write(self, layer: int, chunk: int, k: Tensor, v: Tensor, pooled: Tensor) -> None:
        """One chunk of one layer: `k`, `v` `B chunk_tokens heads d`, `pooled` `B heads s d`."""
        if self.keys is None:
            self._allocate(k, pooled)
        tokens = slice(self.slot(chunk) * self.chunk_tokens, (self.slot(chunk) + 1) * self.chunk_tokens)
        self.keys[layer, :, :, tokens] = k.transpose(1, 2)
        self.values[layer, :, :, tokens] = v.transpose(1, 2)
        self.pooled[layer, :, :, self.blocks(chunk)] = pooled

    def blocks(self, chunk: int) -> slice:
        """The chunk's blocks within the ring."""
        first = self.slot(chunk) * self.per_chunk
        return slice(first, first + self.per_chunk)

    def advance(self, new_chunks: list[int]) -> None:
        """After the forward of `new_chunks`: forgets what the next call will not see."""
        self.chunks = [*self.chunks, *new_chunks][-self.kv_chunks :]

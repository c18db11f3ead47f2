"""How much work a model is: useful and executed floating-point operations, from config and sizes alone.

A product of a x b and b x c matrices is 2abc operations; convolutions and attention are counted as the
products they are, everything else (norms, activations, softmax, resizing) as nothing. So does
`torch.utils.flop_counter.FlopCounterMode`, against which every function here is tested. Attention counts
the pairs the plan lets see each other, never the masked ones: a dense kernel under a mask executes more than
it usefully does.

    work = dit(config.dit, tokens=84_480, pairs=clip_pairs(config.dit, grid, ratio=2.0, window=None))
    work.forward                                 one forward
    useful, executed = work.training(recompute=True)      for MFU and HFU

Sizes are of the output, in pixels; `start` says that a call begins a clip (its first frame stands alone).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from flashvsr.attention.plans import CHUNK
from flashvsr.attention.selection import Selection, budget, causal_chunks
from flashvsr.config import DiTConfig, ProjectorConfig, TCDecoderConfig, VAEConfig

LATENT_PIXELS, TOKEN_PIXELS = 8, 16
# A fused attention keeps no scores: its backward makes them again (one of five products, two in a forward).
SCORES_AGAIN = Fraction(1, 2)


@dataclass(frozen=True)
class Work:
    """Operations of one forward, by part.

    pairs: parts that multiply activations with each other (attention); fixed: parts of `pairs` whose keys and
    values need no gradient (the prompt's); first: parts that read the module's input.
    """

    parts: Mapping[str, int]
    pairs: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    first: frozenset[str] = field(default_factory=frozenset)

    @property
    def forward(self) -> int:
        return sum(self.parts.values())

    def __mul__(self, times: int) -> Work:
        parts = {name: times * count for name, count in self.parts.items()}
        return Work(parts, self.pairs, self.fixed, self.first)

    def backward(self, *, weights: bool = True, inputs: bool = False) -> int:
        """Operations that gradients need: of the weights unless they are frozen (an adapter's own, small
        products are not counted), of activations always, of the module's input when `inputs`."""
        total = 0
        for name, count in self.parts.items():
            if name in self.pairs:
                total += count * (1 if name in self.fixed else 2)
            else:
                total += count * (weights + (inputs or name not in self.first))
        return total

    def training(
        self, *, weights: bool = True, inputs: bool = False, recompute: bool = False
    ) -> tuple[int, int]:
        """Useful and executed operations of forward and backward (numerators of MFU and HFU).

        Executed adds what is computed twice: a fused attention's scores, and with `recompute` (activation
        checkpointing) the whole forward.
        """
        useful = self.forward + self.backward(weights=weights, inputs=inputs)
        again = sum(int(count * SCORES_AGAIN) for name, count in self.parts.items() if name in self.pairs)
        return useful, useful + again + recompute * self.forward


def attention(pairs: int, dim: int) -> int:
    """Scores and weighted values of `pairs` query-key pairs per head, all heads (dim = heads x width)."""
    return 4 * pairs * dim


def dit(
    config: DiTConfig, *, tokens: int, pairs: int, batch: int = 1, segments: int = 1, layers_fed: int = 0
) -> Work:
    """The transformer on `batch` sequences of `tokens`.

    pairs: visible query-key token pairs per head of one sequence (`dense_pairs`, `clip_pairs`,
    `selected_pairs`). Prompt keys and values come from before. Feeding LR features costs no product.
    """
    d, n, length = config.dim, batch * tokens, config.layers
    patch = config.in_channels * 4
    return Work(
        {
            "patch": 2 * n * patch * d,
            "time": 2 * batch * segments * (config.freq_dim * d + d * d + 6 * d * d),
            "projections": 2 * n * 4 * d * d * length,
            "attention": attention(batch * pairs, d) * length,
            "cross projections": 2 * n * 2 * d * d * length,
            "cross attention": attention(n * config.text_len, d) * length,
            "feed-forward": 2 * n * 2 * d * config.ffn * length,
            "head": 2 * n * d * patch,
        },
        pairs=frozenset({"attention", "cross attention"}),
        fixed=frozenset({"cross attention"}),
        first=frozenset({"patch"}),
    )


def dense_pairs(sizes: Sequence[int]) -> int:
    """Pairs of packed segments of `sizes` tokens, each dense inside itself."""
    return sum(size * size for size in sizes)


def selected_pairs(selection: Selection) -> int:
    """Pairs per head that a selection kept, of one batch entry (rounded mean over heads and batch)."""
    batch, heads = selection.counts.shape[:2]
    return round(selection.counts.sum().item() * selection.block_tokens**2 / (batch * heads))


def kept_pairs(visible: Sequence[int], per_chunk: int, block_tokens: int, ratio: float | None) -> int:
    """Pairs per head that selection keeps without a local window and without ties: `visible` counts, per
    query chunk, the chunks it sees. One budget per query chunk (see `flashvsr.attention.selection`)."""
    blocks = 0
    for seen in visible:
        legal = per_chunk * per_chunk * seen
        blocks += legal if ratio is None else budget(per_chunk, legal, ratio)
    return blocks * block_tokens**2


def clip_pairs(
    config: DiTConfig, grid: tuple[int, int, int], *, ratio: float | None, window: int | None
) -> int:
    """Pairs per head of a whole clip under the sparse causal plan; `grid`: latents, rows, columns."""
    chunks = grid[0] // CHUNK
    visible = causal_chunks(chunks, chunks if window is None else window).sum(1).tolist()
    return kept_pairs(visible, *_blocks(config, grid), ratio)


def step_pairs(config: DiTConfig, grid: tuple[int, int, int], *, ratio: float | None, past: int) -> int:
    """Pairs per head of one streaming call on a token grid that sees `past` cached chunks beside its own."""
    chunks = grid[0] // CHUNK
    return kept_pairs([past + chunks] * chunks, *_blocks(config, grid), ratio)


def _blocks(config: DiTConfig, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Blocks per chunk, tokens per block."""
    time, rows, columns = config.block
    return (grid[1] // rows) * (grid[2] // columns), time * rows * columns


def choosing(heads: int, head_dim: int, query_blocks: int, key_blocks: int) -> int:
    """Pooled scores of a selection, one layer."""
    return 2 * heads * head_dim * query_blocks * key_blocks


def projector(config: ProjectorConfig, *, frames: int, height: int, width: int, start: bool = True) -> Work:
    """LR Proj-In on 4n+1 frames (4n when not `start`), in any mode."""
    pixels, taps = 3 * TOKEN_PIXELS**2, 4 * 3 * 3
    area = (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
    groups = (frames + 3 * start) // 4
    emitted = groups - start
    return Work(
        {
            "conv1": 2 * taps * pixels * config.hidden1 * area * 2 * groups,
            "conv2": 2 * taps * config.hidden1 * config.hidden2 * area * groups,
            "linear": 2 * config.hidden2 * config.out_dim * config.layer_num * area * emitted,
        },
        first=frozenset({"conv1"}),
    )


def tc_decoder(config: TCDecoderConfig, *, latents: int, height: int, width: int) -> Work:
    """The TC decoder on `latents` latents; three frames of a first call are computed and dropped."""
    area, frames = (height // LATENT_PIXELS) * (width // LATENT_PIXELS), latents
    condition = 3 * 4 * LATENT_PIXELS**2
    a = config.channels[0]
    parts = {
        "in": _conv(config.latent_channels + condition, a, 9, area * frames),
        "level 1": _conv(a, a, 9, area * frames),
    }
    levels = zip(config.channels[:-1], config.channels[1:], (1, 2, 2), strict=True)
    for level, (c, after, grow) in enumerate(levels, 1):
        blocks = 3 * (_conv(2 * c, c, 9, area * frames) + 2 * _conv(c, c, 9, area * frames))
        parts[f"level {level}"] = parts.get(f"level {level}", 0) + blocks
        area *= 4
        parts[f"grow {level}"] = _conv(c, c * grow, 1, area * frames)
        frames *= grow
        parts[f"level {level + 1}"] = _conv(c, after, 9, area * frames)
    d = config.channels[-1]
    parts["level 4"] += _conv(d, d, 9, area * frames)
    parts["out"] = _conv(d, 3, 9, area * frames)
    return Work(parts, first=frozenset({"in"}))


def _conv(c_in: int, c_out: int, taps: int, places: int) -> int:
    return 2 * c_in * c_out * taps * places


def vae_encode(config: VAEConfig, *, frames: int, height: int, width: int, start: bool = True) -> Work:
    """The VAE's encoder on 1+4a frames (4a when not `start`)."""
    widths = [config.dim, config.dim, config.dim * 2, config.dim * 4, config.dim * 4]
    area = height * width
    parts = {"in": _conv(3, config.dim, 27, area * frames)}
    for level, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        parts[f"level {level}"] = _residual(c_in, c_out, area * frames) + _residual(
            c_out, c_out, area * frames
        )
        if level < 3:
            area //= 4
            parts[f"level {level}"] += _conv(c_out, c_out, 9, area * frames)
            if level > 0:
                halved = (frames - start) // 2
                parts[f"level {level}"] += _conv(c_out, c_out, 3, area * halved)
                frames = halved + start
    out = 2 * config.z_dim
    parts["out"] = _conv(widths[-1], out, 27, area * frames) + _conv(out, out, 1, area * frames)
    return _with_middle(parts, widths[-1], area, frames)


def vae_decode(config: VAEConfig, *, latents: int, height: int, width: int, start: bool = True) -> Work:
    """The VAE's decoder on `latents` latents."""
    widths = [config.dim * 4, config.dim * 4, config.dim * 4, config.dim * 2, config.dim]
    area, frames, z = height * width // LATENT_PIXELS**2, latents, config.z_dim
    parts = {"in": _conv(z, z, 1, area * frames) + _conv(z, widths[0], 27, area * frames)}
    middle = (area, frames)
    for level, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        c_in = c_in // 2 if level > 0 else c_in
        work = _residual(c_in, c_out, area * frames) + 2 * _residual(c_out, c_out, area * frames)
        if level < 3:
            if level < 2:
                work += _conv(c_out, 2 * c_out, 3, area * (frames - start))
                frames = 2 * (frames - start) + start
            area *= 4
            work += _conv(c_out, c_out // 2, 9, area * frames)
        parts[f"level {level}"] = work
    parts["out"] = _conv(config.dim, 3, 27, area * frames)
    return _with_middle(parts, widths[0], *middle)


def _residual(c_in: int, c_out: int, places: int) -> int:
    shortcut = _conv(c_in, c_out, 1, places) if c_in != c_out else 0
    return _conv(c_in, c_out, 27, places) + _conv(c_out, c_out, 27, places) + shortcut


def _with_middle(parts: dict[str, int], channels: int, area: int, frames: int) -> Work:
    places = area * frames
    parts["middle"] = 2 * _residual(channels, channels, places) + _conv(channels, 4 * channels, 1, places)
    parts["middle attention"] = attention(area * area * frames, channels)
    return Work(parts, pairs=frozenset({"middle attention"}), first=frozenset({"in"}))

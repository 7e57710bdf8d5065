"""What MoDeGPT by loss costs on one GPU, from floating-point operations alone; nothing here is measured.

Counts follow the code: Grams of one triangle in float32, solves in float64, one block on the GPU at a time.
Rates are assumptions, stated in the table's heading and set by options. Peak memory is that of the widest
block: its weights, the hidden states of one batch, its moments and the solver's work space.

    python scripts/cost_model.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class Size:
    """A Llama: width, MLP width, blocks, query heads, key heads, size of a head, vocabulary."""

    name: str
    d: int
    ff: int
    blocks: int
    heads: int
    key_heads: int
    h: int
    vocabulary: int = 32000

    @property
    def attention(self) -> int:
        """Parameters of q, k, v and o in one block."""
        return 2 * self.d * self.h * (self.heads + self.key_heads)

    @property
    def block(self) -> int:
        """Parameters of one block."""
        return self.attention + 3 * self.d * self.ff


SIZES = (
    Size("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152),
    Size("Llama-2-7B", 4096, 11008, 32, 32, 32, 128),
    Size("Llama-2-70B", 8192, 28672, 80, 64, 8, 128),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--gradient-tokens", type=int, default=32 * 2048)
    parser.add_argument("--bf16", type=float, default=400, help="TFLOP/s of forward and backward")
    parser.add_argument("--fp32", type=float, default=40, help="TFLOP/s of Grams, TF32 off")
    parser.add_argument("--fp64", type=float, default=30, help="TFLOP/s of solves")
    parser.add_argument("--eigh", type=float, default=1, help="TFLOP/s of eigenvectors, far below products")
    args = parser.parse_args()
    rows = [row(size, args) for size in SIZES]
    print(
        f"{args.tokens:,} calibration tokens, {args.gradient_tokens:,} of them for gradients; minutes, at "
        f"bf16 {args.bf16:g}, fp32 {args.fp32:g}, fp64 {args.fp64:g}, eigenvectors {args.eigh:g} TFLOP/s\n"
    )
    print(tabulate(rows, "keys", "github", disable_numparse=True))


def row(size: Size, args: argparse.Namespace) -> dict[str, str]:
    """One model's stages, in minutes."""
    seconds = {
        "plain forward": forward(size, args.tokens) / args.bf16,
        "input Grams": input_grams(size) * args.tokens / args.fp32,
        "forward and backward for G": 4 * forward(size, args.gradient_tokens) / args.bf16,
        "gradient Grams": gradient_grams(size) * args.gradient_tokens / args.fp32,
        "decide: MLP": mlp(size) * size.blocks / args.fp64,
        "decide: factors": factors(size, args.fp64, args.eigh) * size.blocks,
        "solve": (mlp(size) / args.fp64 + 0.5 * factors(size, args.fp64, args.eigh)) * size.blocks,
    }
    minutes = {what: value / 1e12 / 60 for what, value in seconds.items()}
    line = {"model": size.name, **{what: f"{value:.2f}" for what, value in minutes.items()}}
    return {**line, "in all": f"{sum(minutes.values()):.1f}", "peak GB": f"{peak(size) / 1e9:.1f}"}


def forward(size: Size, tokens: int) -> float:
    """Two operations for each parameter and token; attention's own products left out."""
    return 2.0 * tokens * (size.block * size.blocks + size.vocabulary * size.d)


def input_grams(size: Size) -> float:
    """One triangle, a multiplication and an addition for each entry: q/k/v, o, gate/up, down."""
    inner = size.heads * size.h
    return float(size.blocks * (2 * size.d**2 + inner**2 + size.ff**2))


def gradient_grams(size: Size) -> float:
    """G at q, k, v, o and down; gate's and up's gradients pulled back to the width first."""
    q, k, d = size.heads * size.h, size.key_heads * size.h, size.d
    return float(size.blocks * (q**2 + 2 * k**2 + 2 * d**2 + 2 * (2 * size.ff * d + d**2)))


def mlp(size: Size) -> float:
    """Nyström for one MLP: ``WᵀGW``, an inverse, elimination with its updates, one factorisation, ``K L``."""
    n, d = size.ff, size.d
    pulled = 2 * d * d * n + 2 * d * n * n
    inverse, elimination, errors = n**3, 2 * n**3, n**3 / 3 + 2 * n**3
    return float(pulled + inverse + elimination + errors)


def factors(size: Size, products: float, eigh: float) -> float:
    """LoRD for the seven layers of a block: the Gram under the metric, and its eigenvectors (about 9 n³).

    Operations divided by their rates.
    """
    d, ff = size.d, size.ff
    q, k = size.heads * size.h, size.key_heads * size.h
    total = 0.0
    for out, into in ((q, d), (k, d), (k, d), (d, q), (ff, d), (ff, d), (d, ff)):
        small, large = min(out, into), max(out, into)
        total += (2 * small * large * (small + large) + 4 * small**3) / products + 9 * small**3 / eigh
    return total


def peak(size: Size) -> float:
    """Bytes: one block in bf16, its largest moments and four matrices of the MLP's width in float64."""
    return 2.0 * size.block + 8.0 * (size.ff**2 + 3 * size.d**2) + 8.0 * 4 * size.ff**2


if __name__ == "__main__":
    main()

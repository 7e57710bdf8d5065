"""What MoDeGPT by loss costs on one GPU, from floating-point operations alone; nothing here is measured.

Counts follow the code: Grams of one triangle in float32, solves in float64, one block on the GPU at a time;
262,144 calibration tokens, 65,536 of them for gradients; minutes, at ``RATES``, which are assumptions. Peak
memory is that of the widest block: its weights, its moments, and the solver's work space.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.suite import Key, Lab, Measured, Suite
from benchmarks.tables import Table

TOKENS, GRADIENT_TOKENS = 128 * 2048, 32 * 2048
# TFLOP/s of forward and backward; of Grams, TF32 off; of solves; of eigenvectors, far below products.
RATES = {"bf16": 400.0, "fp32": 40.0, "fp64": 30.0, "eigh": 1.0}


class Size(NamedTuple):
    """A Llama: its width, MLP width, blocks, the widths of all query and all key heads, and vocabulary."""

    d: int
    ff: int
    blocks: int
    q: int
    k: int
    vocabulary: int = 32000


SIZES = {
    "SmolLM2-135M": Size(576, 1536, 30, 9 * 64, 3 * 64, 49152),
    "Llama-2-7B": Size(4096, 11008, 32, 32 * 128, 32 * 128),
    "Llama-2-70B": Size(8192, 28672, 80, 64 * 128, 8 * 128),
}
STAGES = ("plain forward", "input Grams", "forward and backward for G", "gradient Grams", "decide: MLP",
          "decide: factors", "solve")  # fmt: skip


def measure(job: Key, lab: Lab) -> Measured:
    """Yield one model's stages in minutes."""
    d, ff, blocks, q, k, vocabulary = SIZES[job["model"]]
    block = 2 * d * (q + k) + 3 * d * ff  # parameters
    per_token = 2.0 * (block * blocks + vocabulary * d)  # attention's own products are left out
    # One triangle, a multiplication and an addition for each entry: q/k/v, o, gate/up, down.
    input_grams = blocks * (2 * d**2 + q**2 + ff**2)
    # G at q, k, v, o and down; gate's and up's gradients are pulled back to the width first.
    gradient_grams = blocks * (q**2 + 2 * k**2 + 2 * d**2 + 2 * (2 * ff * d + d**2))
    # Nyström for one MLP: WᵀGW, an inverse, elimination with its updates, one factorisation, K L.
    mlp = (2 * d * d * ff + 2 * d * ff * ff + ff**3 + 2 * ff**3 + ff**3 / 3 + 2 * ff**3) / RATES["fp64"]
    factors = 0.0  # LoRD for a block's layers: the Gram under the metric, and its eigenvectors (about 9 n³)
    for out, into in ((q, d), (k, d), (k, d), (d, q), (ff, d), (ff, d), (d, ff)):
        small, large = min(out, into), max(out, into)
        products = 2 * small * large * (small + large) + 4 * small**3
        factors += products / RATES["fp64"] + 9 * small**3 / RATES["eigh"]
    seconds = (
        per_token * TOKENS / RATES["bf16"],
        input_grams * TOKENS / RATES["fp32"],
        4 * per_token * GRADIENT_TOKENS / RATES["bf16"],
        gradient_grams * GRADIENT_TOKENS / RATES["fp32"],
        mlp * blocks,
        factors * blocks,
        (mlp + 0.5 * factors) * blocks,
    )
    minutes = {stage: operations / 1e12 / 60 for stage, operations in zip(STAGES, seconds, strict=True)}
    # One block in bf16, its largest moments, and four matrices of the MLP's width in float64.
    peak = 2.0 * block + 8.0 * (ff**2 + 3 * d**2) + 8.0 * 4 * ff**2
    yield {}, {**minutes, "in all": sum(minutes.values()), "peak GB": peak / 1e9}


COLUMNS = {"model": "", **dict.fromkeys(STAGES, ".2f"), "in all": ".1f", "peak GB": ".1f"}
MINUTES = Table(("model",), COLUMNS, where={"model": ["Llama-2-7B", "Llama-2-70B"]})
JOBS = [{"model": model} for model in SIZES]
SUITE = Suite(lambda rows: JOBS, measure, {"minutes": MINUTES}, quick=JOBS[1])

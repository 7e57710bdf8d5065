"""bitsandbytes: its hazards on a CPU, its formats against plain torch, and models that it quantised."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.engine.adoption import adopted
from lowrank_ft.errors import LowRankError, StateError, TargetError
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.quant import Scheme, storage_of
from lowrank_ft.structure.manifest import describe
from tests.tiny import TINY, VOCAB, logits, perturb

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
LEVELS = {"nf": torch.tensor(NF4), "fp4": torch.tensor(FP4) / 12}
SHAPES = [(64, 64), (96, 576), (20, 24), (33, 65), (1, 3), (3, 1)]


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


def linear4bit(
    rows: int,
    columns: int,
    quant_type: str = "nf4",
    double: bool = False,
    block: int = 64,
    bias: bool = False,
) -> Any:
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias)
    options = {"blocksize": block, "quant_type": quant_type, "compress_statistics": double}
    layer.weight = bnb.nn.Params4bit(weights(rows, columns), module=layer, **options).to("cpu")
    return layer.eval()


def linear8bit(rows: int, columns: int, bias: bool = False) -> Any:
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=bias, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weights(rows, columns), requires_grad=False).to("cpu")
    return layer.eval()


def taken_over(layer: nn.Module) -> Quantized:
    """What stands in the place of a bitsandbytes layer after wrap() and unload()."""
    model = nn.Sequential(layer)
    lowrank_ft.unload(lowrank_ft.wrap(model, "lora", rank=1))
    (found,) = model
    assert isinstance(found, Quantized)
    return found


def repack(layer: Any) -> None:
    """What a forward in eval mode does; without AVX512-BF16, by the function that it would call."""
    if layer.support_avx512bf16_for_cpu:
        layer.eval()(torch.randn(1, layer.in_features))
        return
    convert = getattr(functional, "_convert_weight_packed_for_cpu", None)
    if convert is None:
        pytest.skip("no AVX512-BF16 here, and this bitsandbytes lacks the conversion that it is for")
    layer.weight.data, _ = convert(layer.weight.data, layer.weight.quant_state)


def error_of(read: Tensor, weight: Tensor) -> float:
    return float((read.float() - weight).norm() / weight.norm())


# Plain torch ------------------------------------------------------------------------------------------------


def dynamic_map() -> Tensor:
    """The eight-bit map of Dettmers 2022, appendix: seven decades, a bit of fraction more in each."""
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        decades.append(10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


def nested(scales: Tensor, supers: Tensor, offset: Tensor) -> Tensor:
    return dynamic_map()[scales.long()] * supers.repeat_interleave(256)[: len(scales)] + offset


def four_bit(codes: Tensor, scales: Tensor, levels: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """Two codes a byte, the first in the high half; a scale for each block of the rows laid end to end."""
    nibbles = torch.stack([codes >> 4, codes & 15], 1).flatten().long()[: shape[0] * shape[1]]
    index = torch.arange(len(nibbles)) // block
    return (levels[nibbles] * scales[index]).view(shape)


def read(layer: Any) -> Tensor:
    """The weight of a layer of bitsandbytes', in float32."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.float() * (scales / 127)[:, None]
    state = layer.weight.quant_state
    scales = nested(state.absmax, state.state2.absmax, state.offset) if state.nested else state.absmax
    levels = LEVELS[{"nf4": "nf"}.get(state.quant_type, "fp4")]
    return four_bit(layer.weight.data.flatten(), scales, levels, state.blocksize, tuple(state.shape))


def test_tables_are_bitsandbytes_own() -> None:
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())
    assert torch.equal(LEVELS["nf"], functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(LEVELS["fp4"], functional.get_4bit_type("fp4", device="cpu"))


def excess(values: Tensor, chosen: Tensor, levels: Tensor) -> float:
    """How much further from the values the chosen levels are than the nearest ones."""
    nearest = (values.double().flatten()[:, None] - levels.double()).abs().amin(1)
    return float(((values.double() - chosen.double()).abs().flatten() - nearest).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale_bits", [8, 32])
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("codebook", ["nf", "fp4"])
def test_four_bits_are_what_the_format_says(
    codebook: Any, block: int, scale_bits: int, shape: tuple[int, int]
) -> None:
    W, levels = weights(*shape), LEVELS[codebook]
    storage = storage_of(Scheme(codebook, 4, block, scale_bits, library="bitsandbytes"))
    packed = storage.pack(W)
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == storage.shapes(*shape)

    largest = nn.functional.pad(W.flatten(), (0, -W.numel() % block)).view(-1, block).abs().amax(1)
    scales = packed["scales"]
    if scale_bits == 8:
        assert torch.equal(packed["offset"], largest.mean()[None])
        supers = packed["supers"].repeat_interleave(256)[: len(largest)]
        if len(largest) > 1:  # of one scale nothing is left but its mean, and any code is right
            # bitsandbytes looks codes up in a table of 2¹⁶ cells.
            over = (largest - largest.mean()) / supers
            assert excess(over, dynamic_map()[scales.long()], dynamic_map()) <= 2**-15
        scales = nested(scales, packed["supers"], packed["offset"])
    assert scale_bits == 8 or torch.equal(scales, largest)
    expected = four_bit(packed["codes"], scales, levels, block, shape)
    assert torch.equal(storage.unpack(packed, shape[1], 0, shape[0], torch.float32), expected)
    start = shape[0] // 3
    row = storage.unpack(packed, shape[1], start, start + 1, torch.float32)
    assert torch.equal(row, expected[start : start + 1])

    in_units = W / largest.repeat_interleave(block)[: W.numel()].view(shape)
    chosen = four_bit(packed["codes"], torch.ones_like(largest), levels, block, shape)
    assert excess(in_units, chosen, levels) <= 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_what_the_format_says(shape: tuple[int, int]) -> None:
    W = weights(*shape)
    storage = storage_of(Scheme("int8", 8, library="bitsandbytes"))
    packed = storage.pack(W)
    assert torch.equal(packed["scales"], W.abs().amax(1))
    exact = 127 * W / W.abs().amax(1, keepdim=True)
    assert ((packed["codes"] - exact).abs() <= 0.5 + 1e-5).all()
    expected = packed["codes"].float() * (packed["scales"] / 127)[:, None]
    assert torch.equal(storage.unpack(packed, shape[1], 0, shape[0], torch.float32), expected)


# Hazards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
def test_rows_that_are_no_multiple_of_the_block(double: bool) -> None:
    layer = linear4bit(96, 576, double=double, block=128)
    W, expected = weights(96, 576), read(layer)
    assert error_of(expected, W) < 0.1
    assert error_of(functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), W) > 0.2
    assert torch.equal(taken_over(layer).matrix(torch.float32), expected)


@pytest.mark.parametrize("double", [False, True])
def test_a_forward_repacks_the_weight(double: bool) -> None:
    layer, W = linear4bit(64, 128, double=double), weights(64, 128)
    mine = taken_over(copy.deepcopy(layer))
    assert error_of(functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), W) < 0.1
    before = layer.weight.data.clone()
    repack(layer)
    assert not torch.equal(layer.weight.data.flatten(), before.flatten())
    naive = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert error_of(naive, W) > 0.9

    stored = {k: t.clone() for k, t in mine.packed.items()}
    model = lowrank_ft.wrap(nn.Sequential(mine), "lora", rank=2)
    for training in (False, True):
        x = torch.randn(5, 128, requires_grad=training)
        model.train(training)(x).sum().backward()
    perturb(model)
    lowrank_ft.merge(model)
    lowrank_ft.unmerge(model)
    lowrank_ft.unload(model)
    assert model[0] is mine
    assert all(torch.equal(mine.packed[k], t) for k, t in stored.items())
    assert error_of(mine.matrix(), W) < 0.1


@pytest.mark.parametrize("double", [False, True])
def test_a_repacked_weight_is_refused(double: bool) -> None:
    layer = linear4bit(64, 128, double=double)
    model = nn.Sequential(nn.Linear(128, 128), layer)
    repack(layer)
    with pytest.raises(StateError, match=r"layer 1 cannot be taken over.*repacked.*Load the model again"):
        lowrank_ft.wrap(model, "lora")
    model.state_dict()  # packs the codes back, but not the scales
    with pytest.raises(StateError, match=r"layer 1 cannot be taken over.*repacked.*Load the model again"):
        lowrank_ft.wrap(model, "lora")
    assert model[1] is layer


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(20, 24), (33, 65), (32, 96), (20, 64)], ids=str)
def test_sizes_that_its_forward_fails_on(shape: tuple[int, int], double: bool) -> None:
    layer = linear4bit(*shape, double=double, bias=True)
    expected, bias = read(layer), layer.bias.detach().clone()
    with pytest.raises((AssertionError, RuntimeError), match="divisible|even|invalid for input"):
        repack(layer)
    mine = taken_over(layer)  # the failed forward has changed how scales are kept, but not what they are
    assert torch.equal(mine.matrix(torch.float32), expected)
    x = torch.randn(7, shape[1])
    torch.testing.assert_close(mine.eval()(x), x @ expected.T + bias)


# Taking layers over -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_reads_what_bitsandbytes_reads(quant_type: str, double: bool, shape: tuple[int, int]) -> None:
    layer = linear4bit(*shape, quant_type=quant_type, double=double)
    expected, codes = read(layer), layer.weight.data
    if shape[1] % 64 == 0:
        theirs = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(theirs, expected)
    mine = taken_over(layer)
    assert torch.equal(mine.matrix(), expected)
    assert torch.equal(mine.codes[: codes.numel()], codes.flatten())
    if shape[0] * shape[1] % 64 == 0:
        assert mine.codes.data_ptr() == codes.data_ptr()  # no memory is taken twice


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_run", [False, True])
def test_reads_what_bitsandbytes_reads_in_int8(has_run: bool, shape: tuple[int, int]) -> None:
    layer = linear8bit(*shape, bias=True)
    if has_run:
        layer.init_8bit_state()
    codes, expected = layer.weight.data, read(layer)
    theirs = functional.int8_vectorwise_dequant(
        codes, 127 * expected.abs().amax(1) / codes.float().abs().amax(1)
    )
    mine = taken_over(layer)
    assert torch.equal(mine.matrix(), expected)
    torch.testing.assert_close(mine.matrix(), theirs, rtol=1e-6, atol=0)
    assert mine.codes.data_ptr() == codes.data_ptr()
    assert torch.equal(mine.bias, layer.bias)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_kept_in_another_type(storage: torch.dtype) -> None:
    layer = linear4bit(64, 64)
    expected = read(layer)
    layer.weight.data = layer.weight.data.flatten().view(storage)[:, None]
    assert torch.equal(taken_over(layer).matrix(), expected)


def test_a_weight_that_lost_its_state() -> None:
    layer = linear4bit(64, 64)
    expected = read(layer)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # as FSDP leaves it
    assert torch.equal(taken_over(layer).matrix(), expected)


def test_keeps_mode_flags_and_type() -> None:
    assert not taken_over(linear4bit(32, 64)).training
    layer = linear4bit(32, 64, bias=True).train()
    layer.bias.requires_grad_(False)
    layer.bias.data = layer.bias.data.bfloat16()
    mine = taken_over(layer)
    assert mine.training
    assert not mine.bias.requires_grad
    assert mine.weight.dtype == mine.bias.dtype == torch.bfloat16
    half = nn.Sequential(nn.LayerNorm(64, dtype=torch.bfloat16), linear4bit(64, 64))
    with adopted(half):
        pass
    assert half[1].weight.dtype == torch.bfloat16  # what the model computes in, not what was quantised


def _other_map(layer: Any) -> None:
    layer.weight.quant_state.state2.code = torch.linspace(-1, 1, 256)


def _other_block(layer: Any) -> None:
    layer.weight.quant_state.state2.blocksize = 128


def _half_scales(layer: Any) -> None:
    layer.weight.quant_state.state2.dtype = torch.bfloat16


def _transposed_scales(layer: Any) -> None:
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.view(64, -1).T


def _short(layer: Any) -> None:
    layer.weight.data = layer.weight.data[:-1]


def _other_shape(layer: Any) -> None:
    layer.weight.quant_state.shape = torch.Size((128, 64))


def _on_meta(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.data.to("meta"), requires_grad=False)


def _stateless(layer: Any) -> None:
    layer.weight.quant_state = layer.quant_state = None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_map, "dynamic map. Quantise the original weights again"),
        (_other_block, "dynamic map"),
        (_half_scales, "dynamic map"),
        (_transposed_scales, r"its scales are \(2, 64\)"),
        (_short, "its 8192 weights take 4095 bytes. Load the model again"),
        (_other_shape, r"it is 64 × 128, but its weight was quantised as \(128, 64\)"),
        (_on_meta, "on the meta device. Load the model's weights first"),
        (_stateless, "not quantised yet. Move the model to a device first"),
    ],
)
def test_a_damaged_layer_is_refused(damage: Any, message: str) -> None:
    layer = linear4bit(64, 128, double=True)
    model = nn.Sequential(linear4bit(128, 128), nn.ReLU(), layer)
    before = list(model)
    damage(layer)
    with pytest.raises(StateError, match=f"bitsandbytes' layer 2 cannot be taken over: .*{message}"):
        lowrank_ft.wrap(model, "lora")
    assert list(model) == before


def test_an_int8_layer_without_codes_is_refused() -> None:
    fresh = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    with pytest.raises(StateError, match="layer 0 cannot be taken over: it is not quantised yet"):
        lowrank_ft.wrap(nn.Sequential(fresh), "lora")
    with pytest.raises(StateError, match="keeps its weight in 16 bits"):
        lowrank_ft.wrap(nn.Sequential(bnb.nn.Linear8bitLt(8, 8)), "lora")
    lost = linear8bit(8, 8)
    lost.weight.SCB = lost.weight.SCB[:4]
    with pytest.raises(StateError, match=r"its scales are \(4,\)"):
        lowrank_ft.wrap(nn.Sequential(lost), "lora")


def test_a_layer_with_two_names() -> None:
    layer = linear4bit(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    lowrank_ft.wrap(model, "lora", rank=2, targets=["0"])
    assert model[0] is model[2]


# Models of transformers' ------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
THEIRS = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def loaded(
    directory: Path, options: dict[str, Any], stored: bool = False, name: str = "llama", **kwargs: Any
) -> Any:
    """A tiny model through bitsandbytes, quantised as it loads, or from a checkpoint of quantised weights."""
    from transformers import BitsAndBytesConfig

    plain = TINY[name].model()
    plain.save_pretrained(directory / "plain")
    config = BitsAndBytesConfig(**options)
    model = type(plain).from_pretrained(directory / "plain", quantization_config=config, **kwargs)
    if stored:
        model.save_pretrained(directory / "theirs")
        model = type(plain).from_pretrained(directory / "theirs", **kwargs)
    assert any(isinstance(m, THEIRS) for m in model.modules())
    return model


def dense_twin(model: Any, name: str = "llama") -> nn.Module:
    """The stock model with the weights that bitsandbytes' layers stand for."""
    twin = TINY[name].model()
    stock = dict(twin.named_modules())
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, THEIRS):
                weight = read(module)
                stock[path].weight.copy_(weight if isinstance(stock[path], nn.Linear) else weight.T)
    return twin


def snapshot(model: Any) -> Any:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return list(model.named_modules()), state, dict(model.__dict__), dict(model.config.__dict__)


def assert_unchanged(model: Any, before: Any) -> None:
    modules, state, attributes, config = before
    now = dict(model.named_modules())
    assert list(now) == [name for name, _ in modules]
    assert all(now[name] is module for name, module in modules)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert model.__dict__ == attributes
    assert model.config.__dict__ == config


@every_config
@pytest.mark.parametrize("stored", [False, True], ids=["fresh", "stored"])
def test_a_model_is_wrapped_trained_and_saved(options: dict[str, Any], stored: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.trainer_utils import validate_quantization_for_training

    batch = TINY["llama"].inputs()
    model = loaded(tmp_path, options, stored)
    expected = logits(dense_twin(model), batch)
    assert lowrank_ft.wrap(model, "lora", rank=2) is model
    assert not any(isinstance(m, THEIRS) for m in model.modules())
    assert model.config.quantization_config["quant_method"] == "lowrank_ft"
    left = {"hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"}
    assert not left & model.__dict__.keys()
    assert not hasattr(model.config, "_is_quantized")
    validate_quantization_for_training(model)
    torch.testing.assert_close(logits(model, batch), expected)

    base = {k: t.clone() for k, t in engine.stock_tensors(model).items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    assert all(torch.equal(base[k], t) for k, t in engine.stock_tensors(model).items())

    trained = logits(model, batch)
    model.save_pretrained(tmp_path / "a")
    lowrank_ft.save(model, tmp_path / "b")
    for directory in ("a", "b"):
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert torch.equal(logits(reloaded, batch), trained)
        assert describe(reloaded) == describe(model)
        reloaded.save_pretrained(tmp_path / directory / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / directory / "again")
        assert torch.equal(logits(again, batch), trained)

    lowrank_ft.unload(model)
    packed = [m for m in model.modules() if isinstance(m, Quantized)]
    assert len(packed) == 14
    torch.testing.assert_close(logits(model, batch), expected)
    model.save_pretrained(tmp_path / "base")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(reloaded, batch), logits(model, batch))


@every_config
@pytest.mark.parametrize("stored", [False, True], ids=["fresh", "stored"])
def test_a_failure_leaves_the_model_as_it_was(options: dict[str, Any], stored: bool, tmp_path: Path) -> None:
    model = loaded(tmp_path, options, stored)
    before = snapshot(model)
    attempts: list[tuple[type[LowRankError], str, dict[str, Any]]] = [
        (TargetError, "matches no layer", {"method": "lora", "targets": "no_such_layer"}),
        (LowRankError, "cannot be called", {"method": "lora", "name": "a/b"}),
        (LowRankError, "compressed already|quantised already", {"method": "nf"}),
        (LowRankError, "pass data=", {"method": "corda"}),
    ]
    for error, message, arguments in attempts:
        with pytest.raises(error, match=message):
            lowrank_ft.wrap(model, **arguments)
        assert_unchanged(model, before)
    assert model.is_quantized
    if not stored:  # transformers cannot save a model again that it read quantised
        model.save_pretrained(tmp_path / "still")
        assert any(isinstance(m, THEIRS) for m in type(model).from_pretrained(tmp_path / "still").modules())
    lowrank_ft.wrap(model, "lora", rank=2)


def test_a_later_stage_that_fails_leaves_what_came_before(tmp_path: Path) -> None:
    from lowrank_ft.algorithms.corda import CorDA
    from lowrank_ft.algorithms.lord import LoRD

    model = loaded(tmp_path, {**CONFIGS["nf4"], "llm_int8_skip_modules": ["q_proj", "lm_head"]})
    data = [{"input_ids": torch.randint(3, VOCAB, (2, 10))} for _ in range(4)]
    stages = [LoRD(ratio=0.05, align=1), CorDA(rank=1000)]
    with pytest.raises(LowRankError, match="rank"):
        lowrank_ft.wrap(model, stages, targets=["q_proj"], data=data)
    assert "lowrank" in {node.kind for node in describe(model).values()}
    assert not any(isinstance(m, THEIRS) for m in model.modules())
    assert model.config.quantization_config["quant_method"] == "lowrank_ft"


@pytest.mark.parametrize("name", ["opt", "gpt2", "phi3", "qwen3"])
@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_other_models(name: str, kind: str, tmp_path: Path) -> None:
    model, batch = loaded(tmp_path, CONFIGS[kind], name=name), TINY[name].inputs()
    twin = dense_twin(model, name)
    lowrank_ft.wrap(model, "lora", rank=2)
    torch.testing.assert_close(logits(model, batch), logits(twin, batch))
    perturb(model)
    adapted = logits(model, batch)
    model.save_pretrained(tmp_path / "a")
    reloaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(logits(reloaded, batch), adapted)
    lowrank_ft.merge(model)
    assert not describe(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_gradients_pass_layers_that_carry_no_adapter(kind: str, tmp_path: Path) -> None:
    model, batch = loaded(tmp_path, CONFIGS[kind], name="opt"), TINY["opt"].inputs()
    twin = lowrank_ft.wrap(dense_twin(model, "opt"), "lora", rank=2, targets=["q_proj"])
    lowrank_ft.wrap(model, "lora", rank=2, targets=["q_proj"])
    for other in (model, twin):
        perturb(other)(**batch).loss.backward()
    mine = [p.grad for p in model.parameters() if p.requires_grad]
    theirs = [p.grad for p in twin.parameters() if p.requires_grad]
    assert len(mine) == len(theirs) == 4
    torch.testing.assert_close(mine, theirs)


def test_without_an_adapter(tmp_path: Path) -> None:
    model, batch = loaded(tmp_path, CONFIGS["nf4"]), TINY["llama"].inputs()
    with adopted(model):
        pass
    model.save_pretrained(tmp_path / "a")
    reloaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(logits(reloaded, batch), logits(model, batch))
    with adopted(model):  # nothing of bitsandbytes' is left
        pass
    assert describe(model) == describe(reloaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = loaded(tmp_path, CONFIGS["nf4-double"], dtype=dtype), TINY["llama"].inputs()
    expected = logits(dense_twin(model).to(dtype), batch)
    lowrank_ft.wrap(model, "lora", rank=2)
    assert {m.weight.dtype for m in model.modules() if isinstance(m, Quantized)} == {dtype}
    torch.testing.assert_close(logits(model, batch), expected, rtol=0.05, atol=0.05)
    model.save_pretrained(tmp_path / "a")
    reloaded = type(model).from_pretrained(tmp_path / "a", dtype=dtype)
    assert torch.equal(logits(reloaded, batch), logits(model, batch))


def test_a_model_that_has_run(tmp_path: Path) -> None:
    """Where its forward repacks, the model is refused; where it fails on these sizes, nothing is lost."""
    model, batch = loaded(tmp_path, CONFIGS["nf4-double"]), TINY["llama"].inputs()
    expected = logits(dense_twin(model), batch)
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError, match="invalid for input"):
        repack(layer)
    lowrank_ft.wrap(model, "lora", rank=2)
    torch.testing.assert_close(logits(model, batch), expected)


def test_skipped_layers_stay_stock(tmp_path: Path) -> None:
    options = {**CONFIGS["nf4"], "llm_int8_skip_modules": ["q_proj", "lm_head"]}
    model, batch = loaded(tmp_path, options), TINY["llama"].inputs()
    lowrank_ft.wrap(model, "lora", rank=2, targets=["q_proj"])
    assert sum(isinstance(m, Quantized) for m in model.modules()) == 12  # untargeted ones too
    perturb(model)
    model.save_pretrained(tmp_path / "a")
    reloaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(logits(reloaded, batch), logits(model, batch))

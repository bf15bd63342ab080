"""8-bit moments: what a code means, what a round trip keeps, how far other block borders may move a value."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch

from dist_cpt.config.schema import OptimConfig
from dist_cpt.optim.eight_bit import BLOCK, SMALLEST_SCALE, EightBit, dynamic_map, half_step, within_half_step
from dist_cpt.optim.optimizer import SLICE_ELEMENTS, AdamW, Clip, Part

SIGNED = pytest.mark.parametrize("signed", [True, False])


def values(number: int, signed: bool, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers, or their squares, over several decades within every block."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(number, generator=generator) * 10 ** torch.empty(number).uniform_(-5, 0, generator=generator)
    return scale * (normal if signed else normal.square())


def packed(given: torch.Tensor, signed: bool) -> EightBit:
    moment = EightBit(given.numel(), signed=signed, device=given.device)
    moment.write(given)
    return moment


@SIGNED
def test_the_map_is_that_of_bitsandbytes_apart_from_its_lowest_entry(signed: bool) -> None:
    from bitsandbytes.functional import create_dynamic_map

    entries, borders = dynamic_map(signed)
    theirs = create_dynamic_map(signed=signed)
    assert torch.equal(entries[1:], theirs[1:])
    assert float(entries[0]) == (-1.0 if signed else 0.0)
    assert float(entries[-1]) == 1.0
    assert entries.numel() == 256
    assert bool((entries.diff() > 0).all())
    assert torch.equal(borders[1:], ((entries[1:] + entries[:-1]) / 2)[1:])
    assert float(borders[0]) == (float(entries[0] + entries[1]) / 2 if signed else 0.0)


@SIGNED
@pytest.mark.parametrize("number", [1, 255, 256, 257, 100_003])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-30, 1e6])
def test_a_second_quantisation_changes_nothing(signed: bool, number: int, scale: float) -> None:
    first = packed(values(number, signed, scale), signed)
    second = packed(first.read(), signed)
    assert torch.equal(second.codes, first.codes)
    assert torch.equal(second.scales, first.scales)
    assert torch.equal(second.read(), first.read())


@SIGNED
def test_every_entry_of_the_map_survives_at_every_scale(signed: bool) -> None:
    entries, _ = dynamic_map(signed)
    for scale in [*torch.logspace(-30, 30, 61).tolist(), 1 / 3, 1e-12]:
        given = entries * torch.tensor(scale)
        assert torch.equal(packed(given, signed).read(), given), scale


@SIGNED
def test_an_error_is_at_most_half_a_gap_of_the_block(signed: bool) -> None:
    given = values(10 * BLOCK, signed)
    error = (packed(given, signed).read() - given).abs().view(-1, BLOCK)
    assert bool((error <= given.abs().view(-1, BLOCK).amax(1, True) * (half_step(signed) + 2.0**-22)).all())
    assert half_step(True) == pytest.approx(0.01054, abs=1e-4)
    assert half_step(False) == pytest.approx(0.0035, abs=1e-4)


@pytest.mark.parametrize("every", [1, 4], ids=["each step", "each fourth step"])
def test_no_element_moves_by_many_learning_rates(every: int) -> None:
    """Gradients of a block over three decades, as under an outlier activation, and steps without any, as in an expert
    that gets no tokens: in fp32 no step is above 1 here. A second moment rounded to 0 makes it hundreds."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1e-4 * torch.randn(16 * BLOCK, generator=generator).mul_(1.5).exp_()
    master = torch.zeros(16 * BLOCK)
    adam = AdamW({"w": master}, OptimConfig(), ["w"])
    for step in range(60):
        before = master.clone()
        grad = torch.randn(16 * BLOCK, generator=generator) * sizes * (step % every == 0)
        adam.update([Part(["w"], [grad], 1.0, 0.0)])
        adam.steps += 1
        assert float((master - before).abs().max()) < 2.0, step


def test_zeros_and_negative_peaks() -> None:
    assert torch.equal(packed(torch.full((300,), 1e-36), True).read(), torch.zeros(300))
    assert torch.equal(EightBit(300, signed=True, device=torch.device("cpu")).read(), torch.zeros(300))
    assert torch.equal(packed(torch.zeros(300), True).read(), torch.zeros(300))
    peak = torch.zeros(BLOCK)
    peak[7] = -3.0
    assert float(packed(peak, True).read()[7]) == -3.0


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_other_borders_stay_within_the_stated_bound_and_a_lost_value_does_not(kind: str) -> None:
    signed = kind == "exp_avg"
    saved = packed(values(5000, signed), signed).read()
    for border in (1, 100, 255, 2048 + 33):
        restored = torch.cat([packed(part, signed).read() for part in (saved[:border], saved[border:])])
        assert within_half_step(kind, restored, saved)
    assert not torch.equal(restored, saved)
    # just above what is kept at all, on one side of a border, and just below it on the other
    edge = torch.full((2 * BLOCK,), 0.9 * SMALLEST_SCALE)
    edge[0] = 1.1 * SMALLEST_SCALE
    saved_edge = packed(edge, signed).read()
    moved = torch.cat([packed(part, signed).read() for part in (saved_edge[:100], saved_edge[100:])])
    assert not torch.equal(moved, saved_edge)
    assert within_half_step(kind, moved, saved_edge)
    assert not within_half_step(kind, torch.zeros_like(saved), saved)
    assert not within_half_step(kind, 1.05 * saved, saved)
    assert not within_half_step(kind, saved.roll(1), saved)


@pytest.mark.parametrize("number", [1, 2 * BLOCK - 1, 2 * BLOCK, 5000])
@pytest.mark.parametrize("place", [0, 255, 256, 700, -1])
def test_the_bound_at_an_element_is_that_of_the_largest_within_255(number: int, place: int) -> None:
    """One large element among ones: others may be off by half a step of it up to 255 away, and by one of 1 beyond."""
    saved = torch.ones(number)
    place = min(place, number - 1) % number
    saved[place] = 1000.0
    for at in {0, number - 1, *(place + d for d in (-256, -255, 0, 255, 256) if 0 <= place + d < number)}:
        restored = saved.clone()
        restored[at] += 0.9 * half_step(False) * 1000.0
        assert within_half_step("exp_avg_sq", restored, saved) == (abs(at - place) < BLOCK), at


def test_slices_of_an_update_are_the_whole_update(monkeypatch: pytest.MonkeyPatch) -> None:
    number = SLICE_ELEMENTS + 3 * BLOCK + 5
    masters = {"w": torch.randn(number)}
    grad = torch.randn(number)
    whole, sliced = (AdamW({"w": masters["w"].clone()}, OptimConfig(), ["w"]) for _ in range(2))
    for adam, elements in ((whole, SLICE_ELEMENTS), (sliced, 4 * BLOCK)):
        monkeypatch.setattr("dist_cpt.optim.optimizer.SLICE_ELEMENTS", elements)
        for _ in range(2):
            adam.update([Part(["w"], [grad], 1e-2, 0.1)])
            adam.steps += 1
    assert torch.equal(whole.masters["w"], sliced.masters["w"])
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(whole.read(kind, "w"), sliced.read(kind, "w"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_the_bits_of_the_pieces(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Whole blocks and a part of one, small and zero gradients, clipping, two updates and a skipped one.

    Sizes are multiples of 64: the remainder of torch's vectorised loop rounds otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 5 * BLOCK + 64, "b": BLOCK, "c": 64}
    masters = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    adams, copies = [], []
    for interpreted in (False, True):
        monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
        adams.append(AdamW({name: m.clone() for name, m in masters.items()}, OptimConfig(), ["a", "b", "c"]))
        copies.append({name: torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes.items()})
    for skip in (0.0, 0.0, 1.0):
        scale = torch.randn(5 * BLOCK + 64, generator=generator).mul_(3).exp_() * 1e-4
        grads = [torch.randn(size, generator=generator) * scale[:size] for size in sizes.values()]
        grads[0][: BLOCK + 3] = 0.0
        clip = Clip(torch.tensor(0.37), torch.tensor(skip))
        for adam, written in zip(adams, copies, strict=True):
            adam.update([Part(list(sizes), [grad.to(dtype, copy=True) for grad in grads], 1e-2, 0.1)], clip, written)
            adam.steps += 1 - clip.skip
    for name in sizes:
        for kind in ("exp_avg", "exp_avg_sq"):
            ours, pieces = (adam.eight_bit[name][kind] for adam in reversed(adams))
            assert torch.equal(ours.scales, pieces.scales), (name, kind)
            assert torch.equal(ours.codes, pieces.codes), (name, kind)
        assert torch.equal(adams[0].masters[name], adams[1].masters[name])
        assert torch.equal(copies[0][name], copies[1][name])


@pytest.mark.parametrize("eight_bit", [(), ("w",)])
def test_a_skipped_update_changes_no_bit(eight_bit: tuple[str, ...]) -> None:
    adam = AdamW({"w": torch.randn(3 * BLOCK + 5)}, OptimConfig(), eight_bit)
    adam.update([Part(["w"], [torch.randn(3 * BLOCK + 5)], 1e-2, 0.1)])
    adam.steps += 1
    before = {kind: adam.read(kind, "w").clone() for kind in ("master", "exp_avg", "exp_avg_sq")}
    bad = torch.full((3 * BLOCK + 5,), float("nan"))
    copies = {"w": torch.zeros(3 * BLOCK + 5, dtype=torch.bfloat16)}
    adam.update([Part(["w"], [bad], 1e-2, 0.1)], Clip(torch.tensor(float("nan")), torch.ones(())), copies)
    assert all(torch.equal(adam.read(kind, "w"), values) for kind, values in before.items())
    assert torch.equal(copies["w"], before["master"].bfloat16())


def test_two_bytes_and_the_scales_per_element() -> None:
    adam = AdamW({"w": torch.zeros(100 * BLOCK)}, OptimConfig(), ["w"])
    assert sum(part.numel() * part.element_size() for part in adam.moments()) == 2 * (100 * BLOCK + 100 * 4)

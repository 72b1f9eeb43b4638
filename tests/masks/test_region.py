"""A mask bound to tensors: what moves, what stays, and that it comes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from masks import Mask, MaskError, ParamTable, Region
from masks.region import _TOGETHER, INDEX_BELOW, storage_order

BASES: dict[str, Tensor] = {}


def channels_last() -> Tensor:
    return torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last)


def odd_strides_of_ones() -> Tensor:
    """Dense, but with strides at the dimensions of size 1 that no allocation would choose."""
    return torch.randn(60).as_strided((10, 1, 6), (6, 99, 1))


def with_offset() -> Tensor:
    BASES["offset"] = torch.randn(200)
    return BASES["offset"][17:137].view(12, 10)


def strided() -> Tensor:
    BASES["strided"] = torch.randn(12, 20)
    return BASES["strided"][:, ::2]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(12, 10),
    "vector": lambda: torch.randn(120),
    "channels_last": channels_last,
    "pointwise_channels_last": lambda: torch.randn(12, 10, 1, 1).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(10, 12).T,
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "odd_strides_of_ones": odd_strides_of_ones,
    "offset": with_offset,
    "strided": strided,
    "float64": lambda: torch.randn(12, 10, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(12, 10).bfloat16(),
}
DENSITIES = {"whole": 1.0, "index": 0.06, "dense": 0.6}


class One(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(value)


def bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(kind).numpy()


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=DENSITIES)
def form(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def bound(layout: str, form: str) -> tuple[One, Region, Tensor]:
    """A model of one tensor, a region of it, and the kept coordinates."""
    torch.manual_seed(len(layout) + len(form))
    model = One(LAYOUTS[layout]())
    keep = (
        torch.rand(model.w.shape).argsort(-1) >= 0 if form == "whole" else torch.rand(model.w.shape) < DENSITIES[form]
    )
    region = Region(Mask(ParamTable.from_model(model), (keep,)), model)
    piece = region.pieces[0]
    if form == "index" and layout != "strided":
        assert piece.index is not None
    else:
        assert (piece.keep is None) == (form == "whole")
        assert piece.index is None
    return model, region, keep


def gradients_like(param: Tensor) -> dict[str, Tensor]:
    """The same values laid out as autograd might: like the parameter, in C order, transposed, with gaps."""
    g = torch.randn(param.shape, dtype=param.dtype)
    gaps = torch.zeros(*param.shape, 2, dtype=param.dtype)
    gaps[..., 0] = g
    last_first = g.permute(*reversed(range(g.ndim))).contiguous().permute(*reversed(range(g.ndim)))
    same = torch.empty_like(param).copy_(g).detach()
    return {
        "C order": g,
        "reversed": last_first,
        "gaps": gaps[..., 0],
        "same": same,
        "offset": torch.cat([g, g])[len(g) :],
    }


def test_gather_and_scatter_are_inverse(bound: tuple[One, Region, Tensor]) -> None:
    model, region, keep = bound
    for g in gradients_like(model.w).values():
        values = region.gather([g])
        assert values[0].numel() == (int(keep.sum()) if region.pieces[0].index is not None else g.numel())
        back = region.scatter(values)[0]
        assert torch.equal(back, torch.where(keep, g, 0))
        assert back.data_ptr() != g.data_ptr()
        assert all(torch.equal(a, b) for a, b in zip(region.gather([back]), values, strict=True))


def test_gather_of_an_expanded_gradient(bound: tuple[One, Region, Tensor]) -> None:
    model, region, keep = bound
    g = torch.tensor(3.0, dtype=model.w.dtype).expand(model.w.shape)
    assert torch.equal(region.scatter(region.gather([g]))[0], keep.to(g.dtype) * 3)


def test_gather_keeps_the_dtype_of_what_it_gathers(bound: tuple[One, Region, Tensor]) -> None:
    model, region, keep = bound
    g = torch.randn(model.w.shape, dtype=torch.float64)
    assert torch.equal(region.scatter(region.gather([g]))[0], torch.where(keep, g, 0))


def test_weights_are_the_current_values(bound: tuple[One, Region, Tensor]) -> None:
    model, region, keep = bound
    with torch.no_grad():
        model.w.add_(1)
    assert torch.equal(region.scatter(region.weights())[0], torch.where(keep, model.w.detach(), 0))


def test_add_moves_only_the_kept_coordinates(bound: tuple[One, Region, Tensor]) -> None:
    model, region, keep = bound
    for g in gradients_like(model.w).values():
        before = model.w.detach().clone()
        where = model.w.data_ptr(), model.w.stride(), model.w.storage_offset()
        region.add_(region.gather([g]))
        assert torch.equal(model.w.detach(), torch.where(keep, before + g, before))
        assert not torch.equal(model.w.detach(), before)
        assert where == (model.w.data_ptr(), model.w.stride(), model.w.storage_offset())


def test_restore_is_bitwise(bound: tuple[One, Region, Tensor]) -> None:
    model, region, keep = bound
    with torch.no_grad():
        model.w[0] = (
            torch.tensor([-0.0, float("nan"), float("inf"), 1e-40, -1.5])
            .repeat(200)[: model.w[0].numel()]
            .view(model.w[0].shape)
        )
    before = bits(model.w).copy()
    where = model.w.data_ptr(), model.w.stride(), model.w.storage_offset()
    saved = region.save()
    assert all(s.data_ptr() != model.w.data_ptr() for s in saved)
    for value in (0.1, 1e30, float("inf"), float("nan")):
        region.add_(region.gather([torch.full(model.w.shape, value, dtype=model.w.dtype)]))
        assert (bits(model.w) != before)[keep.numpy()].any()
        region.restore(saved)
        assert (bits(model.w) == before).all()
    assert where == (model.w.data_ptr(), model.w.stride(), model.w.storage_offset())


@pytest.mark.parametrize("layout", ["offset", "strided"], indirect=True)
def test_storage_around_a_view_is_not_touched(bound: tuple[One, Region, Tensor], layout: str) -> None:
    model, region, _ = bound
    base = BASES[layout]
    assert model.w.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    before = base.clone()
    saved = region.save()
    region.add_(region.gather([torch.ones(model.w.shape)]))
    outside = torch.ones_like(base, dtype=torch.bool)
    (outside[17:137] if layout == "offset" else outside[:, ::2]).fill_(False)
    assert torch.equal(base[outside], before[outside])
    assert not torch.equal(base, before)
    region.restore(saved)
    assert torch.equal(base, before)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(10, 10)


@pytest.fixture
def several() -> tuple[Several, Mask]:
    torch.manual_seed(0)
    model = Several()
    table = ParamTable.from_model(model)
    keep = {
        "scalar": True,
        "empty": True,
        "conv.weight": torch.rand(8, 3, 3, 3) < 0.05,
        "norm.weight": True,
        "fc.weight": torch.rand(10, 10) < 0.5,
    }
    return model, Mask(table, tuple(keep.get(row.name, False) for row in table))


def test_region_of_several_tensors(several: tuple[Several, Mask]) -> None:
    model, mask = several
    region = Region(mask, model)
    assert [piece.row.name for piece in region.pieces] == ["scalar", "conv.weight", "norm.weight", "fc.weight"]
    assert [mask.table.rows[piece.position].name for piece in region.pieces] == [p.row.name for p in region.pieces]
    parameters = dict(model.named_parameters())
    for piece, param in zip(region.pieces, region.params, strict=True):
        assert param is parameters[piece.row.name]
        assert piece.param.data_ptr() == param.data_ptr()
        assert not piece.param.requires_grad
    assert not region.is_empty
    assert not region.is_whole
    assert region.index_nbytes == 8 * mask.counts[mask.table.index("conv.weight")] + 100

    before = {name: p.detach().clone() for name, p in parameters.items()}
    pointers = {name: p.data_ptr() for name, p in parameters.items()}
    saved = region.save()
    region.add_(region.gather([torch.full(p.shape, 0.5) for p in region.params]))
    for row, keep in zip(mask.table, mask.dense(), strict=True):
        assert torch.equal(parameters[row.name].detach(), before[row.name] + 0.5 * keep)
    region.restore(saved)
    assert all(torch.equal(p.detach(), before[name]) for name, p in parameters.items())
    assert pointers == {name: p.data_ptr() for name, p in parameters.items()}
    assert all(p.grad is None and p.requires_grad for p in parameters.values())


def test_region_saves_only_what_the_mask_keeps(several: tuple[Several, Mask]) -> None:
    model, mask = several
    sizes = {p.row.name: s.numel() for p, s in zip(Region(mask, model).pieces, Region(mask, model).save(), strict=True)}
    kept = mask.counts[mask.table.index("conv.weight")]
    assert sizes == {"scalar": 1, "conv.weight": kept, "norm.weight": 8, "fc.weight": 100}


def test_a_region_in_some_of_its_tensors(several: tuple[Several, Mask]) -> None:
    """It moves and restores those alone, without new indices; the region itself stays as it was."""
    model, mask = several
    region = Region(mask, model)
    part = region.only([False, True, False, True])
    assert [piece.row.name for piece in part.pieces] == ["conv.weight", "fc.weight"]
    assert part.pieces == (region.pieces[1], region.pieces[3])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = part.save()
    part.add_(part.gather([torch.full(p.shape, 0.5) for p in part.params]))
    for row, keep in zip(mask.table, mask.dense(), strict=True):
        moved = 0.5 * keep * (row.name in ("conv.weight", "fc.weight"))
        assert torch.equal(dict(model.named_parameters())[row.name].detach(), before[row.name] + moved)
    part.restore(saved)
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())
    assert len(region.pieces) == len(region.params) == len(region.save()) == 4
    assert region.only([False] * 4).is_empty


def test_empty_and_whole_regions(several: tuple[Several, Mask]) -> None:
    model, mask = several
    none = Region(Mask(mask.table, (False,) * len(mask.table)), model)
    assert none.is_empty
    assert none.pieces == ()
    assert none.save() == []
    none.add_([])
    none.restore([])
    everything = Region(Mask(mask.table, (True,) * len(mask.table)), model)
    assert everything.is_whole
    assert everything.index_nbytes == 0
    assert len(everything.pieces) == len(mask.table) - 1  # there is nothing to move in a tensor without entries


def test_form_changes_at_the_stated_density() -> None:
    model = One(torch.randn(100))
    table = ParamTable.from_model(model)
    limit = int(100 * INDEX_BELOW)
    for kept, indexed in ((limit - 1, True), (limit, False)):
        piece = Region(Mask(table, (torch.arange(100) < kept,)), model).pieces[0]
        assert (piece.index is not None) == indexed
        assert (piece.keep is not None) == (not indexed)


def test_region_of_another_model_is_refused(several: tuple[Several, Mask]) -> None:
    model, mask = several
    with pytest.raises(MaskError, match="no parameter scalar"):
        Region(mask, nn.Linear(10, 10))
    model.fc.weight.requires_grad_(False)
    with pytest.raises(MaskError, match=r"fc\.weight is frozen"):
        Region(mask, model)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(memory_format=torch.contiguous_format),
        lambda m: m.double(),
        lambda m: setattr(m.fc.weight, "data", m.fc.weight.data.clone()),
        lambda m: m.norm.weight.requires_grad_(False),
    ],
)
def test_region_knows_when_parameters_have_moved(several: tuple[Several, Mask], move: Callable[[Any], Any]) -> None:
    model, mask = several
    region = Region(mask, model)
    region.restore(region.save())
    assert region.is_current
    move(model)
    assert not region.is_current


def test_storage_order() -> None:
    w = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    flat = storage_order(w)
    assert flat.data_ptr() == w.data_ptr()
    assert flat.tolist() == w.permute(0, 2, 3, 1).reshape(-1).tolist()
    other = torch.randn(4, 3, 2, 2)
    assert storage_order(other, w).tolist() == other.permute(0, 2, 3, 1).reshape(-1).tolist()
    gaps = torch.randn(4, 6)[:, ::2]
    assert storage_order(gaps).tolist() == gaps.reshape(-1).tolist()
    assert storage_order(torch.tensor(3.0)).tolist() == [3.0]
    assert storage_order(torch.ones(1).expand(3)).tolist() == [1.0] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_region_on_a_gpu_with_a_mask_from_the_cpu(several: tuple[Several, Mask]) -> None:
    model, mask = several
    model.cuda()
    region = Region(mask, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = region.save()
    region.add_(region.gather([torch.full(p.shape, 0.5, device="cuda") for p in region.params]))
    for row, keep in zip(mask.table, mask.dense("cuda"), strict=True):
        assert torch.equal(model.get_parameter(row.name).detach(), before[row.name] + 0.5 * keep)
    region.restore(saved)
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("times", [None, 0.3])
def test_moved_is_the_sum_inside_and_the_same_bits_outside(
    bound: tuple[One, Region, Tensor], times: float | None
) -> None:
    model, region, _ = bound
    before = bits(model.w)
    factor = None if times is None else torch.tensor(times, dtype=model.w.dtype)
    for g in gradients_like(model.w).values():
        given = g.clone()
        values = region.gather([g])
        product = values[0] if factor is None else values[0] * factor  # rounded before it is added
        expected = model.w.detach() + region.scatter([product])[0]
        with region.moved(values, factor):
            assert values == []
            assert (bits(model.w) == bits(expected)).all()
        assert (bits(model.w) == before).all()
        assert torch.equal(g, given)


def test_moves_within_moves_that_fail_come_back(several: tuple[Several, Mask]) -> None:
    model, mask = several
    region = Region(mask, model)
    before = [p.detach().clone() for p in model.parameters()]

    def ones() -> list[Tensor]:
        return [torch.ones(piece.shape) for piece in region.pieces]

    with region.moved(ones()):
        pass  # a copy is kept now
    with region.moved(ones(), torch.tensor(2.0)):
        here = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ZeroDivisionError), region.moved(ones()):
            raise ZeroDivisionError
        assert all(torch.equal(a, b) for a, b in zip(here, model.parameters(), strict=True))
        with pytest.raises(IndexError), region.moved(ones()[:-1]):  # fails on its way there
            raise AssertionError("not reached")
        assert all(torch.equal(a, b) for a, b in zip(here, model.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_tensors_that_overlap_come_back() -> None:
    """Too large to be moved together; the second is saved when the first has moved it."""
    base = torch.randn(_TOGETHER + 10)
    model = nn.ParameterList([nn.Parameter(base[:-10]), nn.Parameter(base[10:])])
    region = Region(Mask(ParamTable.from_model(model), (True, True)), model)
    assert len(region._groups) == 2
    before = base.clone()
    with region.moved([torch.ones_like(p) for p in region.params]):
        assert torch.equal(base[10:-10], before[10:-10] + 1 + 1)
    assert torch.equal(base, before)


def test_one_copy_is_kept_and_used_again(several: tuple[Several, Mask]) -> None:
    model, mask = several
    region = Region(mask, model)
    kept = set()
    for _ in range(3):
        with region.moved([torch.zeros(piece.shape) for piece in region.pieces]):
            pass
        assert region._backup is not None
        kept.add(tuple(t.data_ptr() for t in region._backup))
    assert len(kept) == 1
    part = region.only([True, *[False] * (len(region.pieces) - 1)])
    with part.moved([torch.zeros(part.pieces[0].shape)]):
        pass
    assert part._backup is not None
    assert len(part._backup) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dense_form_is_zero_outside_whatever_was_there(dtype: torch.dtype) -> None:
    model = One(torch.randn(40, 5, dtype=dtype))
    keep = torch.rand(40, 5) < 0.5
    region = Region(Mask(ParamTable.from_model(model), (keep,)), model)
    g = torch.randn(40, 5, dtype=dtype)
    g[0], g[1], g[2], g[3] = torch.nan, torch.inf, -torch.inf, -0.0
    got = region.gather([g])[0]
    assert got.dtype == dtype
    assert (bits(got) == bits(torch.where(keep, g, 0))).all()
    (derivative,) = torch.autograd.grad(region.gather([g.requires_grad_()])[0].sum(), g)
    assert torch.equal(derivative, keep.to(dtype))

"""The built-in masks, against counts and definitions by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from scipy import stats
from torch import Tensor, nn

from masks import Budget, Mask, MaskContext, MaskError, ParamTable, build_mask


def flat_of(mask: Mask) -> Tensor:
    return torch.cat([part.reshape(-1) for part in mask.dense("cpu")])


def kept_by_name(mask: Mask) -> dict[str, int]:
    return {layer.row.name: layer.kept for layer in mask.per_layer() if layer.kept}


def budget_of(context: MaskContext, kept: int) -> Budget:
    return Budget(kept, context.table.numel)


@pytest.fixture
def context(small_resnet: nn.Module, images: Any) -> MaskContext:
    return MaskContext(small_resnet, batches=images)


# -- all, none, norm, no_norm ---------------------------------------------------------------------------------


def test_whole_tensor_masks_complement_each_other(context: MaskContext) -> None:
    everything, none = build_mask("all", context), build_mask("none", context)
    norm, rest = build_mask("norm", context), build_mask("no_norm", context)
    # Each normalization layer has as many weights as biases: 8, 3 x 12, 3 x 20.
    assert (everything.num_kept, none.num_kept, norm.num_kept) == (everything.numel, 0, 2 * (8 + 36 + 60))
    assert everything.numel == sum(p.numel() for p in context.model.parameters())
    assert rest == ~norm
    assert everything == norm | rest
    assert none == norm & rest
    assert norm.norm_share == 1.0
    assert rest.norm_share == 0.0
    expected = {
        f"{name}.{kind}"
        for name, module in context.model.named_modules()
        if type(module) is nn.BatchNorm2d
        for kind in ("weight", "bias")
    }
    assert set(kept_by_name(norm)) == expected
    assert len(expected) == 14


def test_parts_of_norm(context: MaskContext) -> None:
    norm = build_mask("norm", context)
    weights, biases = (build_mask("norm", context, options={"part": part}) for part in ("weights", "biases"))
    assert weights.num_kept == biases.num_kept == 104
    assert (weights | biases) == norm
    assert (weights & biases).num_kept == 0
    assert all(name.endswith(".weight") for name in kept_by_name(weights))
    assert all(name.endswith(".bias") for name in kept_by_name(biases))


def test_models_without_what_is_asked_for() -> None:
    plain = MaskContext(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)))
    for name in ("norm", "no_norm"):
        with pytest.raises(
            MaskError, match=f"mask {name}: none of the model's 2 trainable tensors.*register_norm_type"
        ):
            build_mask(name, plain)
    with pytest.raises(MaskError, match="random_depth follows normalization layers, and the model has none"):
        build_mask("random_depth", plain, budget_of(plain, 2))
    with pytest.raises(MaskError, match="the model's normalization layers have no biases"):
        build_mask("norm", MaskContext(nn.Sequential(nn.Linear(3, 3), nn.RMSNorm(3))), options={"part": "biases"})
    frozen = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    frozen[1].requires_grad_(False)
    with pytest.raises(MaskError, match="none of the model's 2 trainable tensors"):
        build_mask("norm", MaskContext(frozen))


# -- magnitude --------------------------------------------------------------------------------------------------


def test_magnitude_at_the_initialization_of_resnet18() -> None:
    """Every gamma is 1, every other weight smaller, every beta 0: half of the mask is the gammas."""
    torch.manual_seed(0)
    context = MaskContext(torchvision.models.resnet18(num_classes=10))
    norm = build_mask("norm", context)
    mask = build_mask("magnitude", context, Budget.matching(norm))
    assert mask.num_kept == norm.num_kept == 9_600
    gammas = [layer for layer in mask.per_layer() if layer.row.role == "norm_weight"]
    assert sum(layer.kept for layer in gammas) == sum(layer.row.numel for layer in gammas) == 4_800
    assert not any(layer.kept for layer in mask.per_layer() if layer.row.role == "norm_bias")
    assert mask.norm_share == 0.5
    assert mask.jaccard(norm) == 4_800 / (9_600 + 9_600 - 4_800) == 1 / 3
    without = build_mask("magnitude", context, Budget.matching(norm), {"exclude_norm": True})
    assert without.norm_share == 0.0
    assert without.jaccard(norm) == 0.0
    # What the gammas leave is what exclude_norm takes first.
    assert (mask & without).num_kept == 4_800


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("exclude_norm", [False, True])
def test_magnitude_is_sorting(context: MaskContext, order: str, exclude_norm: bool) -> None:
    rows = [p.detach().reshape(-1).tolist() for p in context.model.parameters()]
    norm = [[row.is_norm] * row.numel for row in context.table]
    candidates = [
        (-abs(w) if order == "largest" else abs(w), i)
        for i, (w, n) in enumerate(zip(itertools.chain(*rows), itertools.chain(*norm), strict=True))
        if not (n and exclude_norm)
    ]
    for k in (1, 104, 500, len(candidates)):
        chosen = {i for _, i in sorted(candidates)[:k]}
        mask = build_mask("magnitude", context, budget_of(context, k), {"order": order, "exclude_norm": exclude_norm})
        assert set(flat_of(mask).nonzero().squeeze(1).tolist()) == chosen


# -- random -----------------------------------------------------------------------------------------------------


def test_random_is_uniform_over_layers(context: MaskContext) -> None:
    """Kept coordinates fall into tensors in proportion to their sizes, over 50 seeds."""
    k = 1_000
    sizes = torch.tensor([row.numel for row in context.table], dtype=torch.float64)
    total = torch.zeros_like(sizes)
    for seed in range(50):
        counts = build_mask("random", MaskContext(context.model, seed=seed), budget_of(context, k)).counts
        assert sum(counts) == k
        total += torch.tensor(counts)
    expected = 50 * k * sizes / sizes.sum()
    # Drawing without replacement shrinks the variance of multinomial counts by (n - k) / (n - 1).
    shrink = (context.table.numel - k) / (context.table.numel - 1)
    statistic = float(((total - expected) ** 2 / expected).sum()) / shrink
    assert 0.001 < stats.chi2.sf(statistic, len(sizes) - 1) < 0.999


def test_random_is_uniform_over_coordinates() -> None:
    context = MaskContext(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
    hits = torch.zeros(21)
    for seed in range(2_000):
        hits += flat_of(build_mask("random", MaskContext(context.model, seed=seed), Budget(7, 21)))
    # Each is kept with probability 1/3: mean 667, standard deviation 21.
    assert hits.sum() == 14_000
    assert (hits - 2_000 / 3).abs().max() < 4 * (2_000 * 2 / 9) ** 0.5
    assert hits.std() > 8


def test_random_excludes_norm(context: MaskContext) -> None:
    mask = build_mask("random", context, budget_of(context, 2_000), {"exclude_norm": True})
    assert mask.num_kept == 2_000
    assert mask.norm_share == 0.0
    rest = context.table.numel - 208
    assert build_mask("random", context, budget_of(context, rest), {"exclude_norm": True}) == build_mask(
        "no_norm", context
    )
    with pytest.raises(MaskError, match=f"cannot keep {rest + 1} coordinates: only {rest} are eligible"):
        build_mask("random", context, budget_of(context, rest + 1), {"exclude_norm": True})


@pytest.mark.parametrize("name", ["random", "random_depth"])
def test_random_masks_follow_the_seed(context: MaskContext, name: str) -> None:
    def built(seed: int) -> Mask:
        torch.rand(1)  # the global random state is another one at every call
        return build_mask(name, MaskContext(context.model, seed=seed), budget_of(context, 208))

    masks = [built(seed) for seed in range(5)]
    assert masks == [built(seed) for seed in range(5)]
    overlaps = [a.jaccard(b) for a, b in itertools.combinations(masks, 2)]
    assert max(overlaps) < 0.2


def test_random_masks_draw_from_streams_of_their_own(context: MaskContext) -> None:
    random = build_mask("random", context, budget_of(context, 208))
    depth = build_mask("random_depth", context, budget_of(context, 208))
    assert random.jaccard(depth) < 0.2


def in_module(mask: Mask, prefix: str) -> int:
    return sum(kept for name, kept in kept_by_name(mask).items() if name.startswith(prefix))


@pytest.mark.parametrize("seed", range(5))
def test_random_depth_keeps_as_many_per_enclosing_module_as_norm(context: MaskContext, seed: int) -> None:
    context = MaskContext(context.model, seed=seed)
    norm = build_mask("norm", context)
    mask = build_mask("random_depth", context, Budget.matching(norm))
    assert mask.num_kept == 208
    assert mask.norm_share == 0.0
    assert mask.jaccard(norm) == 0.0
    # The smallest module around a normalization layer is the stem, the block, or the shortcut, which lies in
    # the block. Each has enough other weights, so that a block gets what its own layers and its shortcut's have.
    blocks = {"stem.": 2 * 8, "block1.": 2 * 3 * 12, "block2.": 2 * 3 * 20, "fc.": 0}
    assert {prefix: in_module(mask, prefix) for prefix in blocks} == blocks
    assert {prefix: in_module(norm, prefix) for prefix in blocks} == blocks
    for block, width in (("block1", 12), ("block2", 20)):
        shortcut = kept_by_name(mask)[f"{block}.downsample.0.weight"]
        assert 2 * width <= shortcut < 6 * width


def test_random_depth_is_drawn_without_replacement_and_spills_outwards() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4))  # 4 weights for 8 places
            self.b = nn.Linear(3, 2, bias=False)  # 6 more

    model = nn.Sequential(Inner(), nn.Linear(10, 10, bias=False))
    for seed in range(20):
        context = MaskContext(model, seed=seed)
        mask = build_mask("random_depth", context, budget_of(context, 8))
        # The four weights of 0.a go to the layer's weight; its bias takes four of the six of 0.b.
        assert kept_by_name(mask) == {"0.a.0.weight": 4, "0.b.weight": 4}
    # Scaled to 30 places, 15 for the weight and 15 for the bias, no module but the outermost has enough.
    mask = build_mask("random_depth", context, budget_of(context, 30))
    assert mask.num_kept == 30
    assert mask.norm_share == 0
    assert build_mask("random_depth", context, budget_of(context, 110)) == build_mask("no_norm", context)
    with pytest.raises(MaskError, match="cannot keep 111 coordinates: only 110 lie outside norm layers"):
        build_mask("random_depth", context, budget_of(context, 111))


@pytest.mark.parametrize("k", [0, 1, 13, 104, 416, 1_000])
def test_random_depth_scales_to_other_budgets(context: MaskContext, k: int) -> None:
    mask = build_mask("random_depth", context, budget_of(context, k))
    assert mask.num_kept == k
    assert in_module(mask, "fc.") == 0 or k == 1_000
    if k in (104, 416):
        assert [in_module(mask, p) for p in ("stem.", "block1.", "block2.")] == [k * c // 208 for c in (16, 72, 120)]


# -- parameters ---------------------------------------------------------------------------------------------------


def named(context: MaskContext, **options: Any) -> set[str]:
    mask = build_mask("parameters", context, options=options)
    kept = kept_by_name(mask)
    assert all(kept[row.name] == row.numel for row in context.table if row.name in kept)
    return set(kept)


def test_parameters_by_pattern_type_and_role(context: MaskContext) -> None:
    names = {row.name for row in context.table}
    assert named(context) == named(context, role="") == names
    assert named(context, pattern="block1.*") == {n for n in names if n.startswith("block1.")}
    assert named(context, pattern="*.downsample.?.weight") == {
        f"block{i}.downsample.{j}.weight" for i in (1, 2) for j in (0, 1)
    }
    assert named(context, pattern="block[12].conv1.weight") == {"block1.conv1.weight", "block2.conv1.weight"}
    assert named(context, module_type="Linear") == {"fc.weight", "fc.bias"}
    assert named(context, module_type="Batch*") == set(kept_by_name(build_mask("norm", context)))
    assert named(context, role="bias") == {"fc.bias"}
    assert named(context, role="bias+norm_bias") == {n for n in names if n.endswith("bias")}
    convolutions = {n for n, m in context.model.named_modules() if type(m) is nn.Conv2d}
    assert named(context, role=("weight",)) == {f"{n}.weight" for n in convolutions} | {"fc.weight"}
    assert named(context, pattern="block1.*", role="norm_weight") == {
        "block1.bn1.weight",
        "block1.bn2.weight",
        "block1.downsample.1.weight",
    }


def test_parameters_by_layer_and_depth(context: MaskContext) -> None:
    assert named(context, layer="first") == {"stem.0.weight"}
    assert named(context, layer="classifier") == {"fc.weight", "fc.bias"}
    assert named(context, layer="classifier", role="bias") == {"fc.bias"}
    modules = list(dict.fromkeys(row.module_name for row in context.table))
    assert len(modules) == 15
    for n in (1, 2, 4, 15):
        groups = [named(context, depth=f"{i}/{n}") for i in range(1, n + 1)]
        assert sum(len(g) for g in groups) == len(context.table)
        assert set().union(*groups) == {row.name for row in context.table}
        sizes = [len({name.rpartition(".")[0] for name in g}) for g in groups]
        assert sum(sizes) == 15
        assert max(sizes) - min(sizes) <= 1
    assert named(context, depth="1/15") == {"stem.0.weight"}
    assert named(context, depth="15/15") == {"fc.weight", "fc.bias"}
    assert named(context, depth="1/3") == {row.name for row in context.table if row.module_name in modules[:5]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "weigth"}, "unknown role 'weigth'; did you mean weight"),
        ({"layer": "last"}, r"must be any\|first\|classifier"),
        ({"depth": "0/2"}, "depth must be i/n with 1 <= i <= n <= 15, got '0/2'"),
        ({"depth": "3/2"}, "depth must be i/n"),
        ({"depth": "1/16"}, "depth must be i/n"),
        ({"depth": "1"}, "depth must be i/n"),
        ({"depth": "-1/2"}, "depth must be i/n"),
        ({"pattern": "head.*"}, r"none of the 23 tensors meets pattern=head\.\* .*role=any layer=any depth=1/1"),
        ({"pattern": "Block1.*"}, "none of the 23 tensors"),
        ({"role": "bias", "layer": "first"}, "role=bias layer=first"),
    ],
)
def test_parameters_refuses_what_is_not_there(context: MaskContext, options: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        build_mask("parameters", context, options=options)


def test_parameters_layer_needs_a_matrix() -> None:
    with pytest.raises(MaskError, match="layer=first needs a weight matrix, and the model has none"):
        build_mask("parameters", MaskContext(nn.LayerNorm(3)), options={"layer": "first"})


# -- file, and all together --------------------------------------------------------------------------------------


def test_file(context: MaskContext, tmp_path: Path) -> None:
    mask = build_mask("random", context, budget_of(context, 33))
    mask.save(tmp_path / "m.npz")
    again = build_mask("file", context, options={"path": str(tmp_path / "m.npz")})
    assert again == mask
    with pytest.raises(MaskError, match="needs its option path"):
        build_mask("file", context)
    with pytest.raises(MaskError, match="cannot read mask file"):
        build_mask("file", context, options={"path": str(tmp_path / "n.npz")})
    with pytest.raises(MaskError, match="holds a mask of another model"):
        build_mask("file", MaskContext(nn.Linear(2, 2)), options={"path": str(tmp_path / "m.npz")})


def test_matched_masks_of_one_study_have_the_same_size(context: MaskContext) -> None:
    norm = build_mask("norm", context)
    budget = Budget.matching(norm)
    names = ["random", "random_depth", "magnitude", "gradient", "snip", "fisher"]
    masks = [build_mask(name, context, budget) for name in names]
    assert {mask.num_kept for mask in masks} == {208}
    assert {mask.density for mask in masks} == {norm.density}
    assert len({mask.digest() for mask in masks}) == len(masks)


def test_masks_of_a_model_with_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    context = MaskContext(model)
    assert build_mask("all", context).num_kept == 12 + 14
    assert build_mask("random", context, Budget(26, 26)).num_kept == 26
    assert ParamTable.from_model(model).frozen_numel == 42

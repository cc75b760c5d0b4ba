"""The key-value bottleneck: splitting, placing keys, fetching, counting and masking, and what goes wrong with each."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.bottlenecks.key_value import KeyValueBottleneck, from_official
from isthmus.bottlenecks.splitters import Chunk, LearnedProjection, RandomProjection
from isthmus.codec import Fitted, build, load_weights, save_weights, spec_of
from isthmus.decoders.voting import Vote


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _made(pairs: int = 16, **arguments) -> KeyValueBottleneck:
    torch.manual_seed(0)
    made = KeyValueBottleneck(RandomProjection(12, 5, 4), pairs, 3, **{"value_std": 1.0, **arguments})
    return made.fit_keys([_draw(200, 12)], 3, "queries", _seeded()).freeze_keys()


# --------------------------------------------------------------------------------------------------------- splitters


def test_projections_weigh_the_whole_embedding_with_norm_one() -> None:
    splitter, x = RandomProjection(12, 5, 4), _draw(2, 7, 12)
    torch.testing.assert_close(splitter.weight.norm(dim=1), torch.ones(5, 4))
    torch.testing.assert_close(splitter(x)[1, 3], x[1] @ splitter.weight[3])


def test_chunks_are_consecutive_and_learned_projections_have_codebooks_inside() -> None:
    x = _draw(2, 7, 12)
    assert torch.equal(Chunk(12, 3)(x)[:, 1], x[..., 4:8])
    learned = LearnedProjection(12, 5, 4)
    out = F.linear(x, learned.proj.weight)
    assert torch.equal(learned(x)[:, 2, :, 3], out[..., 3 * 5 + 2])
    with pytest.raises(ValueError, match="12 channels cannot be cut into 5"):
        Chunk(12, 5)
    for made, sizes in ((Chunk, (12, 0)), (RandomProjection, (12, 0, 4)), (LearnedProjection, (12, 5, -1))):
        with pytest.raises(ValueError, match="is at least 1"):
            made(*sizes)


# -------------------------------------------------------------------------------------------------------------- keys


def test_it_is_fitted_once_and_before_use() -> None:
    made = KeyValueBottleneck(Chunk(12, 3), 8, 2)
    assert isinstance(made, Fitted)
    for mode in (True, False):
        with pytest.raises(ValueError, match="not placed: call fit"):
            made.train(mode)([_draw(4, 12)])
    made.fit([_draw(50, 12)])
    assert made.fitted
    made([_draw(4, 12)])
    with pytest.raises(ValueError, match="frozen"):
        made.fit_keys([_draw(50, 12)])


def test_looking_up_never_moves_keys() -> None:
    made = _made()
    before = {name: t.clone() for name, t in made.keys.state_dict().items()}
    code = made.train()([_draw(30, 12)])
    code.features[0].sum().backward()
    torch.optim.SGD(made.parameters(), 1.0).step()
    assert all(torch.equal(t, before[name]) for name, t in made.keys.state_dict().items())


def test_fitting_leaves_values_and_counters_alone_and_takes_no_global_randomness() -> None:
    torch.manual_seed(0)
    made = KeyValueBottleneck(Chunk(12, 3), 8, 2, value_std=1.0)
    values, state = made.values.clone(), torch.get_rng_state()
    made.fit_keys([_draw(50, 12)], 2, "kmeans", _seeded())
    assert torch.equal(made.values, values)
    assert not made.used.any()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", ["normal", "queries", "kmeans"])
def test_fitted_keys_are_nearer_to_the_data_than_drawn_ones(start: str) -> None:
    data = 4 + 0.5 * _draw(400, 12)
    torch.manual_seed(1)
    made = KeyValueBottleneck(Chunk(12, 3), 32, 2)
    drawn = -KeyValueBottleneck(Chunk(12, 3), 32, 2).freeze_keys().lookup(data).scores.mean()
    made.fit_keys(data.split(100), 10, start, _seeded()).freeze_keys()  # type: ignore[arg-type]
    assert -made.lookup(data).scores.mean() < 0.1 * drawn
    made.lookup(data)
    assert made.used_share > 0.8, "dead keys are put on data"


def test_normal_keys_that_win_nothing_are_put_on_data_at_once() -> None:
    """As published, where counts start at 0; a start of weight would leave most keys where no query is."""
    data = 50 + _draw(256, 12)
    torch.manual_seed(0)
    made = KeyValueBottleneck(Chunk(12, 3), 512, 2).fit_keys([data], 1, "normal", _seeded()).freeze_keys()
    assert made.keys.codes.mean() > 49
    torch.manual_seed(0)
    kept = KeyValueBottleneck(Chunk(12, 3), 512, 2, dead=0.0)
    before = kept.keys.codes.clone()
    kept.fit_keys([data], 1, "normal")
    same = (kept.keys.codes - before).abs().amax(-1) < 0.02
    assert same.float().mean() > 0.9, "without replacement, keys that win nothing stay where they are"


def test_few_queries_and_used_up_iterators_are_told() -> None:
    made = KeyValueBottleneck(Chunk(12, 3), 64, 2)
    with pytest.warns(UserWarning, match="20 queries to start 64 keys"):
        made.fit_keys([_draw(20, 12)], 1, "kmeans", _seeded())
    assert torch.isfinite(made.keys.codes).all()
    with pytest.raises(ValueError, match="iterator"):
        made.fit_keys(iter([_draw(20, 12)]), 2)
    with pytest.raises(ValueError, match="no batch"):
        made.fit_keys([])
    with pytest.raises(ValueError, match="normal, queries or kmeans"):
        made.fit_keys([_draw(20, 12)], 1, "zeros")  # type: ignore[arg-type]


def _half_of_two(rank: int, address: str, keys: Tensor, used: Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    made = _together(_draw(40, 12)[rank::2])
    torch.testing.assert_close(made.keys.codes, keys)
    assert torch.equal(made.used, used)
    torch.distributed.destroy_process_group()


def _together(data: Tensor) -> KeyValueBottleneck:
    torch.manual_seed(0)
    made = KeyValueBottleneck(Chunk(12, 3), 8, 2, dead=0.0)
    made.fit_keys([data], 3).freeze_keys()
    made.lookup(data)
    return made


def test_two_processes_place_the_keys_of_one(tmp_path: Path) -> None:
    """Each sees half of every batch; keys and counters are those of whoever sees all of it."""
    whole = _together(_draw(40, 12))
    arguments = (f"file://{tmp_path}/meeting", whole.keys.codes, whole.used)
    torch.multiprocessing.spawn(_half_of_two, arguments, nprocs=2)


def test_keys_are_placed_by_hand_until_values_depend_on_them() -> None:
    made = KeyValueBottleneck(Chunk(2, 1), 4, 3)
    grid = torch.cartesian_prod(torch.tensor([0.25, 0.75]), torch.tensor([0.25, 0.75]))
    made.place_keys(grid[None])
    assert made.lookup(torch.tensor([[0.9, 0.1]])).indices.item() == 2
    with pytest.raises(ValueError, match="values were trained"):
        made.place_keys(grid[None])
    with pytest.raises(ValueError, match=r"keys are \(C, J, K\)"):
        KeyValueBottleneck(Chunk(2, 1), 4, 3).place_keys(grid)


# ----------------------------------------------------------------------------------------------------------- lookups


@pytest.mark.parametrize("topk", [1, 3])
def test_values_are_those_of_the_nearest_keys_in_every_layout(topk: int) -> None:
    made = _made(topk=topk).train()
    maps = _draw(2, 12, 3, 2, seed=3)
    tokens = maps.flatten(2).transpose(1, 2)
    found = made.lookup([tokens])
    for c in range(5):
        distance = torch.cdist(found.queries[:, c], made.keys.codes[c])
        want = distance.topk(topk, largest=False)
        assert torch.equal(found.indices[:, c], want.indices)
        torch.testing.assert_close(found.scores[:, c], -want.values.square(), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.values[:, c], made.values[c][want.indices])
        assert torch.equal(found.keys[:, c], made.keys.codes[c][want.indices])
    merged = found.values.sum(3)  # (B, C, N, V)
    as_map = made([maps]).features[0]
    assert as_map.shape == (2, 15, 3, 2)
    torch.testing.assert_close(as_map.view(2, 5, 3, 6), merged.transpose(2, 3))
    torch.testing.assert_close(made([tokens]).features[0], as_map.flatten(2).transpose(1, 2))
    torch.testing.assert_close(made([tokens[:, 0]]).features[0], as_map[:, :, 0, 0])
    torch.testing.assert_close(Vote(3)([as_map]), merged.mean((1, 2)))
    code = made([maps])
    assert code.indices is not None
    assert code.bits is not None
    assert code.indices.shape == (2, 5, 6, topk)
    assert code.bits.tolist() == [5 * 6 * topk * 4.0] * 2


def test_only_fetched_values_learn() -> None:
    made = _made(topk=2)
    found = made.lookup(_draw(6, 12, seed=9))
    found.values.square().sum().backward()
    assert made.values.grad is not None
    touched = made.values.grad.abs().sum(-1) > 0
    fetched = torch.zeros(5, 16, dtype=torch.bool)
    for c in range(5):
        fetched[c, found.indices[:, c].flatten()] = True
    assert torch.equal(touched, fetched)
    assert torch.equal(fetched, made.used > 0)


def test_training_counts_every_fetch_and_evaluation_none() -> None:
    made, x = _made(topk=3), _draw(6, 4, 12, seed=2)
    first = made.lookup(x)
    assert int(made.used.sum()) == 6 * 4 * 5 * 3
    assert not first.counts.any(), "counts are from before the batch"
    again = made.eval().lookup(x)
    assert int(made.used.sum()) == 6 * 4 * 5 * 3
    expected = torch.stack([made.used[c][again.indices[:, c]] for c in range(5)], 1)
    assert torch.equal(again.counts, expected)


def test_evaluation_fetches_only_what_was_trained() -> None:
    made = _made()
    made.lookup(_draw(3, 12, seed=4))
    used = made.used > 0
    assert not used.all()
    found = made.eval().lookup(_draw(100, 12, seed=5))
    for c in range(5):
        assert used[c][found.indices[:, c]].all()


def test_missing_pairs_contribute_nothing_unless_as_released() -> None:
    made = _made(topk=3)
    made.used[:, 2] = 1
    made.used[4] = 0  # a codebook that was never used
    x = _draw(10, 12, seed=6)
    found = made.eval().lookup(x)
    assert (found.indices[:, :4, :, 0] == 2).all()
    assert (found.scores[:, :4, :, 1:] == -math.inf).all()
    assert (found.scores[:, 4] == -math.inf).all()
    assert not found.values[:, :4, :, 1:].any()
    assert not found.values[:, 4].any()
    assert torch.isfinite(made([x]).features[0]).all()

    made.unused = "released"
    published = made.lookup(x)
    lowest = min(-float(torch.cdist(published.queries[:, c], made.keys.codes[c]).square().max()) for c in range(5))
    assert published.indices[:, :4, 0].unique(dim=0).tolist() == [[[2, 0, 1]] * 4]
    assert published.indices[:, 4, 0].unique(dim=0).tolist() == [[0, 1, 2]]
    torch.testing.assert_close(published.scores[:, 4], torch.full((10, 1, 3), lowest))
    assert published.values[:, 4].any()


def test_noise_changes_the_choice_and_cools_down_to_none() -> None:
    made, x = _made(), _draw(200, 12, seed=7)
    sure = made.lookup(x).indices
    torch.manual_seed(0)
    made.temperature = 1e-6
    assert torch.equal(made.lookup(x).indices, sure)
    made.temperature = 5.0
    share = (made.lookup(x).indices == sure).float().mean()
    assert 0.05 < share < 0.6
    made.used.zero_()
    made.used[:, :4] = 1
    assert int(made.eval().lookup(x).indices.max()) < 4


def test_noise_draws_pairs_with_the_probabilities_of_a_softmax() -> None:
    made = KeyValueBottleneck(Chunk(1, 1), 3, 1, temperature=0.5).place_keys(torch.tensor([[[0.0], [0.5], [1.0]]]))
    torch.manual_seed(0)
    found = made.lookup(torch.full((20000, 1), 0.2)).indices
    want = (-(torch.tensor([0.2, 0.3, 0.8]) ** 2) / 0.5).softmax(0)
    torch.testing.assert_close(torch.bincount(found.flatten()) / 20000, want, atol=0.015, rtol=0)


def test_half_precision_is_looked_up_in_full() -> None:
    made, x = _made().eval(), _draw(50, 12, seed=8)
    made.used.fill_(1)
    want = made([x.half().float()])
    with torch.autocast("cpu", torch.bfloat16):
        got = made([x.half()])
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.features[0], want.features[0])
    assert made.half()([x.half()]).features[0].dtype == torch.float16


def test_equal_keys_give_the_lowest_index() -> None:
    made = KeyValueBottleneck(Chunk(4, 1), 9, 1).place_keys(torch.ones(1, 9, 4))
    assert not made.lookup(_draw(40, 4)).indices.any()


# ----------------------------------------------------------------------------------------------------- learning on


def test_values_start_anew_in_place_so_that_an_optimiser_made_before_trains_them() -> None:
    made = _made()
    optimiser = torch.optim.SGD([made.values], 1.0)
    made.lookup(_draw(5, 12))
    made.value_std = 0.0
    made.reset_values()
    assert not made.values.any()
    assert not made.used.any()
    made([_draw(5, 12)]).features[0].sum().backward()
    optimiser.step()
    assert made.values.any()


def test_optimisers_that_move_other_values_are_warned_about() -> None:
    made = _made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.check_optimizer(torch.optim.SGD(made.parameters(), 0.3))
    for optimiser, told in (
        (torch.optim.SGD(made.parameters(), 0.3, momentum=0.9), "momentum 0.9"),
        (torch.optim.SGD(made.parameters(), 0.3, weight_decay=1e-4), "weight_decay 0.0001"),
        (torch.optim.Adam(made.parameters()), "betas"),
    ):
        with pytest.warns(UserWarning, match=told):
            made.check_optimizer(optimiser)
    with pytest.raises(ValueError, match="does not train the bottleneck's values"):
        made.check_optimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.3))


def test_learning_new_classes_leaves_old_ones_alone() -> None:
    """Two far heaps, one after the other: logits of the first do not move while the second is learned."""
    torch.manual_seed(0)
    heaps = torch.tensor([[4.0] * 6, [-4.0] * 6])
    first, second = (h + 0.3 * _draw(40, 6, seed=i) for i, h in enumerate(heaps))
    made = KeyValueBottleneck(RandomProjection(6, 8, 3), 32, 2)
    made.fit_keys([torch.cat([first, second])], 10, "queries", _seeded()).freeze_keys()
    vote, optimiser = Vote(2), torch.optim.SGD([made.values], 30.0)

    def learn(x: Tensor, label: int) -> None:
        for _ in range(20):
            optimiser.zero_grad()
            F.cross_entropy(vote(made.train()([x]).features), torch.full((len(x),), label)).backward()
            optimiser.step()

    learn(first, 0)
    before = vote(made.eval()([first]).features)
    learn(second, 1)
    after = vote(made.eval()([first]).features)
    torch.testing.assert_close(before, after)
    assert (after.argmax(1) == 0).all()
    assert (vote(made([second]).features).argmax(1) == 1).all()


def test_it_is_saved_with_keys_and_counters(tmp_path: Path) -> None:
    made, x = _made(topk=2, unused="released"), _draw(8, 12, seed=1)
    made.lookup(x)
    save_weights(made, tmp_path / "made.safetensors")
    again = build(json.loads(json.dumps(spec_of(made))))
    load_weights(again, tmp_path / "made.safetensors")
    assert again.fitted
    assert torch.equal(again.used, made.used)
    assert torch.equal(again.eval()([x]).features[0], made.eval()([x]).features[0])


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"topk": 9}, "topk must lie between 1 and the 8 pairs"),
        ({"topk": 0}, "topk"),
        ({"temperature": -1.0}, "temperature"),
        ({"unused": "mask"}, "unused is one of drop, released, got 'mask'"),
        ({"decay": 1.0}, "decay"),
        ({"value_dim": 0}, "value_dim"),
    ],
)
def test_impossible_settings_are_told(arguments: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        KeyValueBottleneck(Chunk(12, 3), **{"pairs": 8, "value_dim": 2, **arguments})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_no_numbers_are_refused(value: float) -> None:
    made, x = _made(), _draw(3, 12)
    x[1, 2] = value
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        made([x])
    with pytest.raises(ValueError, match="NaN or infinite"):
        KeyValueBottleneck(Chunk(12, 3), 8, 2).fit_keys([x])


def test_another_width_is_told() -> None:
    with pytest.raises(ValueError, match=r"takes 12 channels.*got \(2, 5, 7\)"):
        _made()([torch.zeros(2, 5, 7)])


def test_votes_of_another_width_than_the_classes_are_told() -> None:
    with pytest.raises(ValueError, match="give the bottleneck value_dim=4"):
        Vote(4)([torch.zeros(2, 15)])


# --------------------------------------------------------------------------------------------- published checkpoints


@pytest.mark.parametrize("kind", ["projection", "learned", "chunk"])
def test_published_files_load(kind: str) -> None:
    keys, values = _draw(5, 16, 4), _draw(5, 16, 3, seed=1)
    bottleneck = {
        "keys": keys,
        "keys_avg": keys,
        "values": values,
        "cluster_size": torch.ones(5, 16),
        "cluster_size_counter": torch.arange(80.0).view(5, 16),
        "initted": torch.ones(1),
    }
    weight = _draw(20, 12, seed=2)
    splitter = {"projection": {"rand_proj": _draw(5, 12, 4)}, "learned": {"proj.weight": weight}, "chunk": {}}[kind]
    made = from_official({"bottleneck": bottleneck, "splitter": splitter}, topk=2)
    assert made.fitted
    assert torch.equal(made.keys.codes, keys)
    assert torch.equal(made.used, torch.arange(80).view(5, 16))
    assert made([_draw(2, 20 if kind == "chunk" else 12)]).features[0].shape == (2, 15)
    if kind == "learned":
        assert torch.equal(made.splitter.proj.weight, weight)


def test_files_of_the_published_package_load() -> None:
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    heads = {"heads": 5, "separate_codebook_per_head": True}
    vq = VectorQuantize(dim=20, codebook_dim=4, codebook_size=16, **heads).eval()  # type: ignore[arg-type]
    state = {f"vq.{name}": tensor for name, tensor in vq.state_dict().items()} | {"values": _draw(5, 16, 3)}
    made = from_official(state).eval()
    x = _draw(7, 3, 20)
    indices = vq(x)[1]
    assert torch.equal(made.lookup(x).indices[..., 0], indices.permute(0, 2, 1))


@pytest.mark.parametrize("random", [False, True])
def test_heads_with_a_projection_of_their_own_load(random: bool) -> None:
    """The package's default with several heads: every head is as wide as all of the embedding."""
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    vq = VectorQuantize(dim=20, codebook_size=16, heads=5, separate_codebook_per_head=True).eval()
    state = {f"vq.{name}": tensor for name, tensor in vq.state_dict().items()} | {"values": _draw(5, 16, 3)}
    x = _draw(7, 3, 20)
    queries = x
    if random:
        state["rand_proj"] = _draw(5, 20, 4)
        queries = torch.einsum("bnd,cde->bnce", x, state["rand_proj"]).flatten(2)
    made = from_official(state).eval()
    assert torch.equal(made.lookup(x).indices[..., 0], vq(queries)[1].permute(0, 2, 1))
    again = build(spec_of(made))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.eval()([x]).features[0], made([x]).features[0])


def test_a_normalised_projection_is_refused() -> None:
    from vector_quantize_pytorch import VectorQuantize

    vq = VectorQuantize(dim=20, codebook_dim=8, codebook_size=16, heads=5, layernorm_after_project_in=True)
    state = {f"vq.{name}": tensor for name, tensor in vq.state_dict().items()} | {"values": _draw(5, 16, 3)}
    with pytest.raises(ValueError, match="normalises behind its projection"):
        from_official(state)


def test_another_file_is_told() -> None:
    with pytest.raises(ValueError, match="no key-value bottleneck"):
        from_official({"weight": torch.zeros(2)})

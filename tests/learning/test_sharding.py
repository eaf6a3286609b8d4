"""Sharded weights: the same losses, gradients, weights and checkpoints at world sizes 1, 2 and 4."""

import pytest
import torch
import torch._dynamo  # as is the next, before ranks are forked: else each would import them
import torch.distributed.fsdp
from safetensors.torch import load_file

from swirl.config import TrainConfig
from swirl.learning import distributed, sharding
from swirl.learning.checkpoints import open_checkpoint, restore, snapshot_of, write_checkpoint
from swirl.learning.objective import Objective
from swirl.learning.optimizer import clip_grad_norm, make_optimizer
from swirl.model import tensor_file
from swirl.model.gemma import Gemma
from swirl.model.lora import LoRA, add_lora, merge_lora
from swirl.model.tensor_file import own_rows
from swirl.sampling.engine import Engine
from tests.learning.ranks import in_ranks
from tests.learning.updates import accumulate, some_actions, some_model


def sharded(model, shard="all", dtype=None):
    if distributed.world_size() == 1:
        return model
    return sharding.shard_model(model, sharding.Sharding(sharding.mesh_over(shard, "cpu"), dtype or model.dtype))


def adapted(dtype=torch.float32, shard="all"):
    """The model with adapters that change what it computes, its frozen weights in shards where there are ranks."""
    model = add_lora(sharded(some_model(dtype).requires_grad_(False), shard), LoRA(3, 6.0), seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
    return model


def updates(number, *, shard="all", dtype=torch.float32, activation_checkpointing="none", lora=False, **changes):
    """Metrics, the last gradients and the weights of a few updates, gathered."""
    model = adapted(dtype, shard) if lora else sharded(some_model(dtype), shard)
    model.activation_checkpointing = activation_checkpointing
    objective = Objective(TrainConfig(mode="recorded", **changes), model)
    optimizer = make_optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    metrics = []
    for update in range(number):
        optimizer.zero_grad()
        objective.refresh(model, update)
        found = accumulate(model, some_actions(update), objective=objective, **changes)
        metrics.append({**found, "grad_norm": clip_grad_norm(model, 1.0).item()})
        optimizer.step()
    weights = {name: sharding.whole(weight.detach()).clone() for name, weight in model.named_parameters()}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = {name: sharding.whole(weight.grad).clone() for name, weight in trained.items()}
    return metrics, gradients, {name: weights[name] for name in trained}


def require_equal(found, truth, tolerance):
    metrics, gradients, weights = found
    for mine, theirs in zip(metrics, truth[0], strict=True):
        for name, value in theirs.items():
            if name == "computed_tokens":  # prefixes that trees on several ranks share are computed on each
                continue
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    for name in weights:
        for mine, theirs in ((gradients[name], truth[1][name]), (weights[name], truth[2][name])):
            assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max(), name


RANKS = [(2, 2, "all"), (4, 2, "node")]
RANKS += [pytest.param(*widest, marks=pytest.mark.slow) for widest in ((4, 4, "all"), (4, 2, "all"))]


@pytest.mark.parametrize(("ranks", "per_node", "shard"), RANKS)
def test_losses_gradients_and_weights_are_those_of_one_rank(ranks, per_node, shard):
    changes = {"kl_coefficient": 0.3, "tokens_per_micro_batch": 40}
    truth = updates(3, **changes)
    for found in in_ranks(ranks, lambda: updates(3, shard=shard, **changes), per_node=per_node):
        require_equal(found, truth, 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": "cheap"},
        {"activation_checkpointing": "layers"},
        {"proximal_every": 2},
        {"packed": False},
        {"dtype": torch.float64},
        {"lora": True, "kl_coefficient": 0.3, "proximal_every": 2},
        pytest.param({"lora": True, "activation_checkpointing": "layers"}, marks=pytest.mark.slow),
    ],
)
def test_every_way_to_compute_an_update_can_be_sharded(changes):
    truth = updates(2, **changes)
    for found in in_ranks(2, lambda: updates(2, **changes)):
        require_equal(found, truth, 1e-5)


def test_shards_of_bfloat16_passes_are_float32_and_gradients_are_summed_in_it():
    def work():
        model = sharded(some_model(torch.float32), dtype=torch.bfloat16)
        accumulate(model, some_actions())
        assert model.dtype == torch.bfloat16 and "ratio" not in Objective(TrainConfig(mode="recorded"), model).measures
        assert {(p.dtype, p.grad.dtype) for p in model.parameters()} == {(torch.float32, torch.float32)}
        return {name: sharding.whole(weight.grad) for name, weight in model.named_parameters()}

    truth, narrow = some_model(torch.float32), some_model(torch.bfloat16)
    accumulate(truth, some_actions())
    make_optimizer(narrow, learning_rate=1e-3)  # sums of its gradients are float32 from here on
    accumulate(narrow, some_actions())
    for found in in_ranks(2, work):
        for (name, weight), other in zip(truth.named_parameters(), narrow.parameters(), strict=True):
            error, theirs = (found[name] - weight.grad).norm(), (other.grad - weight.grad).norm()
            assert error <= 2 * theirs + 1e-4 * weight.grad.norm(), name


def test_the_sampler_has_the_weights_of_the_moment_and_frees_them():
    def work():
        model = sharded(some_model(torch.float32))
        engine = Engine(sharding.sampler_of(model))
        drawn = []
        for _ in range(2):
            with sharding.gathered(model, engine.model, engine.forget):
                drawn.append([c.ids for c in engine.sample([[1, 2, 3]] * 3, seeds=[0, 1, 2], max_new_tokens=8)])
            assert {weight.device.type for weight in engine.model.parameters()} == {"meta"}
            with torch.no_grad():
                model.model.embed_tokens.weight.neg_()
        return drawn

    model = some_model(torch.float32)
    truth = []
    for _ in range(2):
        truth.append([c.ids for c in Engine(model).sample([[1, 2, 3]] * 3, seeds=[0, 1, 2], max_new_tokens=8)])
        with torch.no_grad():
            model.model.embed_tokens.weight.neg_()
    assert truth[0] != truth[1]
    assert all(found == truth for found in in_ranks(2, work))


@pytest.mark.slow
@pytest.mark.parametrize(("per_node", "shard"), [(4, "all"), (2, "node")])
@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float32}, {"dtype": torch.float64, "kl_coefficient": 0.3, "tokens_per_micro_batch": 40}]
)
def test_adapters_beside_shards_over_four_ranks_are_those_of_one(per_node, shard, changes):
    truth = updates(3, lora=True, **changes)
    for found in in_ranks(4, lambda: updates(3, lora=True, shard=shard, **changes), per_node=per_node):
        require_equal(found, truth, 1e-5 if changes["dtype"] == torch.float32 else 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_adapters_frozen_weights_lie_in_shards_and_are_drawn_from_and_merged_as_whole_ones(dtype):
    def drawn(engine):
        return [c.ids for c in engine.sample([[1, 2, 3]] * 3, seeds=[0, 1, 2], max_new_tokens=8)]

    def work():
        model = adapted(dtype)
        frozen = [weight for weight in model.parameters() if not weight.requires_grad]
        assert {(weight.dtype, sharding.is_sharded(weight)) for weight in frozen} == {(dtype, True)}
        assert not sharding.trains_shards(model)
        engine = Engine(sharding.sampler_of(model))
        with sharding.gathered(model, engine.model, engine.forget):
            found = drawn(engine)
        for each in (model, engine.model):
            merge_lora(each)
        with sharding.gathered(model, engine.model, engine.forget):
            return found, {name: weight.clone() for name, weight in engine.model.state_dict().items()}

    truth = adapted(dtype)
    expected = drawn(Engine(truth))
    weights = merge_lora(truth).state_dict()
    for found, merged in in_ranks(2, work):
        assert found == expected and merged.keys() == weights.keys()
        for name, weight in merged.items():
            torch.testing.assert_close(weight, weights[name], msg=name)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_each_rank_reads_its_rows_and_the_checkpoint_is_whole(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 256)
    some_model(torch.float32).save_pretrained(tmp_path / "model")

    def shard(model):
        sharding.shard_as_asked(model, "all", "cpu")

    def work():
        model = Gemma.from_pretrained(tmp_path / "model", dtype=dtype, prepare=shard)
        assert sum(own_rows(p)[0].numel() for p in model.parameters()) < 0.4 * sum(
            p.numel() for p in model.parameters()
        )
        optimizer, objective = make_optimizer(model, learning_rate=1e-2), Objective(TrainConfig(mode="recorded"), model)
        for update in range(2):
            accumulate(model, some_actions(update), objective=objective)
            optimizer.step()
            optimizer.zero_grad()
            snapshot = snapshot_of(model, optimizer, objective, None, update + 1, {})
            if distributed.is_main():
                write_checkpoint(tmp_path / f"checkpoint-{update + 1}", snapshot)
            snapshot.gathers.finish()
        return {name: sharding.whole(weight.detach()) for name, weight in model.named_parameters()}

    final, *_ = in_ranks(3, work)
    found = open_checkpoint(tmp_path / "checkpoint-2")
    for name, weight in found.weights():
        assert weight.dtype == dtype and torch.equal(weight, final[name].to(dtype)), name

    def resume():  # at another world size: the first update's checkpoint, and the second update again
        model = Gemma.from_pretrained(tmp_path / "model", dtype=dtype, prepare=shard)
        optimizer, objective = make_optimizer(model, learning_rate=1e-2), Objective(TrainConfig(mode="recorded"), model)
        restore(open_checkpoint(tmp_path / "checkpoint-1"), model, optimizer, objective)
        snapshot = snapshot_of(model, optimizer, objective, None, 1, {})
        if distributed.is_main():
            write_checkpoint(tmp_path / f"again-{distributed.world_size()}", snapshot)
        if snapshot.gathers is not None:
            snapshot.gathers.finish()
        accumulate(model, some_actions(1), objective=objective)
        optimizer.step()
        return {name: sharding.whole(weight.detach()) for name, weight in model.named_parameters()}

    for ranks in (1, 2):
        for weights in in_ranks(ranks, resume) if ranks > 1 else [resume()]:
            for name, weight in final.items() if dtype == torch.float32 else ():
                assert (weights[name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name
        for name in ("model.safetensors", "training.safetensors"):
            saved, again = (load_file(tmp_path / folder / name) for folder in ("checkpoint-1", f"again-{ranks}"))
            assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)

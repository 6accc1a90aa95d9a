"""One federated step equals one step of the unsplit model on everybody's data together.

Four clients with unequal numbers of tokens, SGD, one round, one local step, through real gRPC.
"""

import pytest
import torch

from tests.acceptance.federation import (
    SGD,
    Whole,
    federation,
    make_batch,
    make_config,
    perturbed,
    write_checkpoint,
)

BATCHES = {
    0: make_batch(1, [3], seed=0),
    1: make_batch(2, [9, 4], seed=1),
    2: make_batch(4, [12, 12, 2, 7], seed=2),
    3: make_batch(3, [20, 18, 20], seed=3),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def relative_error(found, expected):
    """The largest ‖found − expected‖ / ‖expected‖ over tensors."""
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-12))
        for name in expected
    )


def one_round(config, aggregator, *, weights=None, order=None, start=7):
    """Adapters after one round, and after one SGD step of the unsplit model, from one start."""
    with federation(config) as run:
        client0 = perturbed(adapter_of(run), start)
        trunk0 = perturbed(run.engine.adapter(), start + 1)
        run.load_trunk(trunk0)
        batches = {slot: [batch] for slot, batch in BATCHES.items()}
        returned, results, report = run.train(client0, batches, order=order)
        tokens = {slot: float(result.num_tokens) for slot, result in results.items()}
        client = run.aggregate(aggregator, client0, returned, weights or tokens)
        trunk = run.engine.adapter()
    assert report.optimizer_steps == 1
    reference = Whole(config)
    reference.load(client0, trunk0)
    central = reference.sgd_step(list(BATCHES.values()), SGD.learning_rate)
    return {**client, **trunk}, central, {**client0, **trunk0}


def adapter_of(run):
    from flower_split.lora import adapter_state

    return adapter_state(run.client_model(0))


def halves(batch):
    """The batch as two micro-batches of unequal token counts."""
    rows = len(batch["input_ids"])
    parts = [(0, rows // 2), (rows // 2, rows)]
    return [{name: tensor[a:b] for name, tensor in batch.items()} for a, b in parts]


def test_one_round_unequal_clients_equals_one_central_step(checkpoint):
    federated, central, start = one_round(make_config(checkpoint), "fedit")
    assert federated.keys() == central.keys()
    assert relative_error(federated, central) < 1e-5
    assert all(not torch.equal(central[name], start[name]) for name in central)


def test_one_round_with_uniform_weights_is_not_the_central_step(checkpoint):
    uniform = dict.fromkeys(BATCHES, 1.0)
    federated, central, _ = one_round(make_config(checkpoint), "fedit", weights=uniform)
    clients = {
        n: t for n, t in federated.items() if ".layers.2." not in n and ".layers.3." not in n
    }
    assert relative_error(clients, {n: central[n] for n in clients}) > 1e-3


def test_one_round_product_delta_has_the_central_step_to_first_order(checkpoint):
    """From B = 0 the product's mean and the factors' mean agree: ΔW = −lr · ḡ_B A."""
    config = make_config(checkpoint)
    with federation(config) as run:
        client0, trunk0 = adapter_of(run), run.engine.adapter()
        returned, results, _ = run.train(client0, {s: [b] for s, b in BATCHES.items()})
        tokens = {slot: float(result.num_tokens) for slot, result in results.items()}
        client = run.aggregate("product-delta", client0, returned, tokens)
        trunk = run.engine.adapter()
    reference = Whole(config)
    reference.load(client0, trunk0)
    central = reference.sgd_step(list(BATCHES.values()), SGD.learning_rate)
    federated = {**client, **trunk}
    assert relative_error(products(federated), products(central)) < 1e-5


def products(state):
    """B @ A per module: what does not depend on the factorisation."""
    return {
        name: state[name.replace("lora_A", "lora_B")] @ tensor
        for name, tensor in state.items()
        if "lora_A" in name
    }


def test_one_round_of_micro_batches_equals_one_central_step(checkpoint):
    config = make_config(checkpoint, gradient_accumulation_steps=2)
    batches = {slot: batch for slot, batch in BATCHES.items() if len(batch["input_ids"]) > 1}
    with federation(config) as run:
        client0 = perturbed(adapter_of(run), 7)
        trunk0 = perturbed(run.engine.adapter(), 8)
        run.load_trunk(trunk0)
        returned, results, report = run.train(client0, {s: halves(b) for s, b in batches.items()})
        tokens = {slot: float(result.num_tokens) for slot, result in results.items()}
        federated = {**run.aggregate("fedit", client0, returned, tokens), **run.engine.adapter()}
    assert [slot.contributions for slot in report.slots] == [2, 2, 2]
    reference = Whole(config)
    reference.load(client0, trunk0)
    central = reference.sgd_step(list(batches.values()), SGD.learning_rate)
    assert relative_error(federated, central) < 1e-5


def test_one_round_any_starting_order_gives_the_same_bits(checkpoint):
    config = make_config(checkpoint)
    results = [
        one_round(config, "product-delta", order=order)[0]
        for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0))
    ]
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


def test_joint_step_gives_every_lora_parameter_a_gradient_and_a_change(checkpoint):
    federated, _, start = one_round(make_config(checkpoint), "fedit")
    names = {
        (part, kind)
        for name in federated
        for part, layers in (("bottom", "01"), ("trunk", "23"), ("top", "45"))
        for kind in ("lora_A", "lora_B")
        if any(f".layers.{layer}." in name for layer in layers) and kind in name
    }
    assert len(names) == 6
    assert all(not torch.equal(federated[name], start[name]) for name in federated)


def test_one_client_over_grpc_with_lora_steps_bit_for_bit_as_the_unsplit_model(checkpoint):
    config = make_config(checkpoint)
    with federation(config) as run:
        client0 = perturbed(adapter_of(run), 7)
        trunk0 = perturbed(run.engine.adapter(), 8)
        run.load_trunk(trunk0)
        returned, _, _ = run.train(client0, {0: [BATCHES[2]]})
        split = {**returned[0], **run.engine.adapter()}
    reference = Whole(config)
    reference.load(client0, trunk0)
    unsplit = reference.sgd_step([BATCHES[2]], SGD.learning_rate)
    assert split.keys() == unsplit.keys()
    assert all(torch.equal(split[name], unsplit[name]) for name in unsplit)
    assert all(not torch.equal(split[name], {**client0, **trunk0}[name]) for name in split)

"""The same weights have one fingerprint, wherever they are; other weights have another."""

import re

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_resmem.errors import StaleMemoryError
from lightning_resmem.model.fingerprint import check_fingerprint, describe_weights, fingerprint


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


class Buffers(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_it_is_64_hexadecimal_digits_and_the_same_for_the_same_weights():
    found = fingerprint(network())
    assert len(found) == 64
    assert int(found, 16)
    assert fingerprint(network()) == found
    assert fingerprint(network(seed=1)) != found


def test_every_parameter_and_buffer_counts():
    found = {fingerprint(network())}
    for name, tensor in network().state_dict().items():
        model = network()
        model.load_state_dict({**model.state_dict(), name: tensor + 1})
        found.add(fingerprint(model))
    assert len(found) == 1 + len(network().state_dict())


def test_batch_norm_statistics_count():
    model = network()
    before = fingerprint(model)
    model.train()(torch.randn(8, 4))
    assert fingerprint(model) != before


def test_one_bit_counts():
    model = network()
    before = fingerprint(model)
    weight = model[0].weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert fingerprint(model) != before


def test_mode_gradients_and_use_do_not_count():
    model = network().eval()
    before = fingerprint(model)
    model(torch.randn(8, 4)).sum().backward()
    model.train().requires_grad_(False)
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_numbers_in_another_precision_are_the_same(dtype):
    half = network().to(dtype)
    same = network()
    same.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    same[1].num_batches_tracked = half[1].num_batches_tracked
    assert fingerprint(half) == fingerprint(same)
    rounded = dtype != torch.float64
    assert (fingerprint(half) != fingerprint(network())) == rounded


def test_torch_compile_does_not_count():
    before = fingerprint(network())
    assert fingerprint(torch.compile(network(), backend="eager")) == before
    parts = network()
    parts[0] = torch.compile(parts[0], backend="eager")
    assert fingerprint(parts) == before
    in_place = network()
    in_place.compile(backend="eager")
    assert fingerprint(in_place) == before


def with_metrics():
    model = network()
    model.metric = MeanMetric()
    model.metrics = MetricCollection({"mean": MeanMetric()})
    model.alias = model.metric
    for metric in (model.metric, model.metrics["mean"]):
        metric.persistent(True)
    return model


def test_states_of_metrics_do_not_count():
    model = with_metrics()
    assert any("mean_value" in name for name in model.state_dict())
    before = fingerprint(model)
    assert before == fingerprint(network())
    model.metric.update(3.0)
    model.metrics.update(2.0)
    assert fingerprint(model) == before
    model[0].weight.data.add_(1)
    assert fingerprint(model) != before


def test_a_module_whose_name_starts_like_a_metric_counts():
    model = with_metrics()
    model.metric_head = nn.Linear(2, 2)
    assert fingerprint(model) != fingerprint(with_metrics())


def test_layout_in_memory_does_not_count():
    matrix = torch.arange(6.0).view(2, 3)
    strided = matrix.t().contiguous().t()
    assert not strided.is_contiguous()
    assert fingerprint(Buffers(a=strided)) == fingerprint(Buffers(a=matrix))
    wide = torch.stack([matrix, matrix], dim=2)[..., 0]
    assert fingerprint(Buffers(a=wide)) == fingerprint(Buffers(a=matrix))
    image = torch.rand(2, 3, 4, 5)
    assert fingerprint(Buffers(a=image.to(memory_format=torch.channels_last))) == fingerprint(Buffers(a=image))


DIFFERENT = {
    "empty": {},
    "no rows": {"a": torch.zeros(0, 3)},
    "no columns": {"a": torch.zeros(3, 0)},
    "scalar": {"a": torch.tensor(0.0)},
    "one entry": {"a": torch.zeros(1)},
    "other name": {"b": torch.zeros(1)},
    "int": {"a": torch.zeros(1, dtype=torch.int32)},
    "bool": {"a": torch.zeros(1, dtype=torch.bool)},
    "double": {"a": torch.full((1,), 0.1, dtype=torch.float64)},
    "complex": {"a": torch.zeros(1, dtype=torch.complex64)},
    "conjugate": {"a": torch.tensor([1j]).conj()},
    "not conjugate": {"a": torch.tensor([1j])},
    "row": {"a": torch.zeros(1, 2)},
    "column": {"a": torch.zeros(2, 1)},
    "two": {"a": torch.zeros(1), "b": torch.zeros(1)},
    "true": {"a": torch.ones(1, dtype=torch.bool)},
}


def test_names_shapes_dtypes_and_values_count():
    found = {name: fingerprint(Buffers(**tensors)) for name, tensors in DIFFERENT.items()}
    assert len(set(found.values())) == len(DIFFERENT), found
    assert found == {name: fingerprint(Buffers(**tensors)) for name, tensors in DIFFERENT.items()}


def test_state_that_is_no_tensor_is_passed_over():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    torch.manual_seed(0)
    extra = Extra(2, 2)
    plain = nn.Linear(2, 2)
    plain.load_state_dict({name: extra.state_dict()[name] for name in ("weight", "bias")})
    assert fingerprint(extra) == fingerprint(plain)


def test_the_model_is_not_changed():
    model = network().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprint(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[0].weight.requires_grad
    assert model[0].weight.dtype == torch.bfloat16


def test_check():
    model = network()
    check_fingerprint(model, {}, "Testing")  # a memory that was filled by hand belongs to no weights
    check_fingerprint(model, {"fingerprint": fingerprint(model)}, "Testing")
    other = fingerprint(network(seed=1))
    with pytest.raises(StaleMemoryError) as error:
        check_fingerprint(model, {"fingerprint": other}, "Testing")
    message = str(error.value)
    assert message.startswith("Testing with weights")
    assert other[:12] in message
    assert fingerprint(model)[:12] in message
    assert "memorize(trainer, model, dataloader)" in message


# -- what a state holds besides plain tensors


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_int8_weights_count():
    def packed(seed):
        return torch.ao.quantization.quantize_dynamic(network(seed), {nn.Linear}, dtype=torch.qint8)

    model = packed(0)
    model[1] = network(1)[1]  # BatchNorm is the same in both
    before = fingerprint(model)
    other = packed(1)
    other[1] = model[1]
    assert fingerprint(other) != before
    assert fingerprint(packed(0)) == fingerprint(packed(0)) == before
    with pytest.raises(StaleMemoryError, match=r"Different are 0\._packed_params\._packed_params\.0\.values, "):
        check_fingerprint(other, describe_weights(model), "Testing")


class Extra(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_tensors_in_extra_state_count():
    states = [
        (torch.zeros(2), 3),
        (torch.ones(2), 3),
        (torch.zeros(2), torch.zeros(2)),
        {"weight": torch.zeros(2)},
        {"weight": [torch.zeros(2)]},
        torch.zeros(2),
        torch.zeros(2).to_sparse(),
        torch.eye(2).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8),
        torch.quantize_per_tensor(torch.ones(2), 0.25, 0, torch.qint8),
        torch.quantize_per_channel(torch.ones(2, 2), torch.tensor([0.5, 0.25]), torch.zeros(2), 0, torch.qint8),
    ]
    found = [fingerprint(Extra(state)) for state in states]
    assert len(set(found)) == len(states)
    assert fingerprint(Extra((torch.zeros(2), 4))) == found[0]


# -- which tensors differ


def test_tensors_that_differ_are_named():
    provenance = describe_weights(network())
    check_fingerprint(network(), provenance, "Testing")
    model = network()
    model[3].bias.data[0] += 1
    with pytest.raises(StaleMemoryError, match=r"another model\. Different are 3\.bias\. Use the weights"):
        check_fingerprint(model, provenance, "Testing")
    for parameter in model.parameters():
        parameter.data += 1
    model[1].running_mean += 1
    names = "0.bias, 0.weight, 1.bias, 1.running_mean, 1.weight and 2 more"
    with pytest.raises(StaleMemoryError, match=rf"Different are {re.escape(names)}\."):
        check_fingerprint(torch.compile(model, backend="eager"), provenance, "Testing")
    with pytest.raises(StaleMemoryError, match=r"This model's state has 2 tensors, that model's had 9\."):
        check_fingerprint(nn.Linear(2, 2), provenance, "Testing")


def test_the_checksums_are_compact_and_earlier_memories_have_none():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300)))
    provenance = describe_weights(model)
    assert set(provenance) == {"fingerprint", "tensors"}
    assert len(provenance["tensors"]) == 3200
    check_fingerprint(model, {"fingerprint": fingerprint(model)}, "Testing")
    with pytest.raises(StaleMemoryError, match=r"another model\. Use the weights"):
        check_fingerprint(network(), {"fingerprint": fingerprint(model)}, "Testing")


def test_fingerprints_are_those_of_earlier_releases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).double())
    for tensor in model.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) / 7)
    assert fingerprint(model) == "e408e36dbad64fb2da596d99eb7a420f7a5e0360e0404f2f21f30639f5a4d90c"

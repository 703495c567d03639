"""A base that does worse on its own training rows than a constant is noticed, and an ordinary one is not."""

import re
import warnings

import pytest
import torch
from torch.nn import functional as F

from lightning_resmem import LocalMemory, ResMemCallback, ResMemWarning, memorize
from lightning_resmem.memory.base_quality import look_at_base
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.tasks import Multiclass, Multilabel, Regression
from tests.models import Data, Embeds, Numbers, make, trainer


def filled(task, outputs, targets, **options):
    memory = LocalMemory(task, **options)
    memory.add(torch.randn(len(outputs), 3), outputs, targets)
    memory.build()
    return memory


def labels(rows=200, classes=5):
    return torch.randint(classes, (rows,))


def logits(targets, classes=5, wrong=0.3):
    """Right for most rows."""
    said = torch.where(torch.rand(len(targets)) < wrong, torch.randint(classes, (len(targets),)), targets)
    return 3 * F.one_hot(said, classes) + torch.randn(len(targets), classes) * 0.1


def quiet(task, outputs, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResMemWarning)
        look_at_base(filled(task, outputs, targets))


def test_standardised_targets():
    targets = 100 + 20 * torch.randn(200, 1)
    outputs = (targets - 100) / 20 + 0.1 * torch.randn(200, 1)
    expected = (outputs - targets).square().mean()
    said = re.escape(f"the base has a mean squared error of {expected:.4g}; ")
    match = rf"{said}.*correlation 0.99.*standardised.*targets_fn"
    with pytest.warns(ResMemWarning, match=match):
        look_at_base(filled(Regression(), outputs, targets))
    quiet(Regression(), outputs * 20 + 100, targets)


def test_the_output_that_is_worse_is_named():
    targets = torch.randn(200, 2) * torch.tensor([1.0, 1000.0]) + 5
    outputs = targets + torch.randn(200, 2) * torch.tensor([0.1, 100.0])
    quiet(Regression(), outputs, targets)
    outputs[:, 0] *= 16
    with pytest.warns(ResMemWarning, match="output 0 of the base has"):
        look_at_base(filled(Regression(), outputs, targets))


@pytest.mark.parametrize("noise", [0.05, 0.3, 0.7])
def test_targets_in_other_units_that_the_base_follows(noise):
    """Better than a constant all the same."""
    targets = torch.randn(400, 1)
    follows = targets + noise * torch.randn(400, 1)
    follows *= follows.mul(targets).sum() / follows.square().sum()  # as least squares would have it
    quiet(Regression(), follows, targets)
    quiet(Regression(), 0.8 * follows, targets)  # weight decay
    for outputs in (follows / 2, 1.6 * follows):
        with pytest.warns(ResMemWarning, match=r"follows the targets \(correlation .* does so much better"):
            look_at_base(filled(Regression(), outputs, targets))
    with pytest.warns(ResMemWarning, match=r", but (1|1\.\d+|0\.9\d+) \* output -0\.[78]\d* does so"):
        look_at_base(filled(Regression(), follows + 0.8, targets))
    with pytest.warns(ResMemWarning, match=r"output 1 of the base follows the targets"):
        look_at_base(filled(Regression(), torch.cat([follows, follows / 2], dim=1), targets.expand(-1, 2)))


def test_targets_along_a_curve():
    for targets, mapped in (
        (torch.randn(400, 1), lambda y: y.sign() * y.abs().sqrt()),
        (torch.rand(400, 1) ** 3 * 2, torch.sqrt),
    ):
        outputs = mapped(targets) + 0.05 * torch.randn(400, 1)
        with pytest.warns(ResMemWarning, match=r"follows the targets along a curve \(correlation 0.9"):
            look_at_base(filled(Regression(), outputs, targets))
    counts = torch.poisson(torch.exp(torch.randn(400, 1)))
    with pytest.warns(ResMemWarning, match="follows the targets"):
        look_at_base(filled(Regression(), counts.log1p(), counts))


@pytest.mark.parametrize("values", ["dense", SparseConfig(top_m=2)], ids=["dense", "sparse"])
def test_worse_than_the_most_frequent_class(values):
    targets = torch.where(torch.rand(200) < 0.5, torch.zeros(200, dtype=torch.int64), labels())
    outputs = logits((targets + 1) % 5)
    with pytest.warns(ResMemWarning, match=r"is right \d+\.\d% of the time; the most frequent class alone is \d\d\."):
        look_at_base(filled(Multiclass(), outputs, targets, values=values))
    quiet(Multiclass(), logits(targets), targets)


def test_outputs_that_never_occur_as_labels():
    targets = labels()
    outputs = torch.randn(200, 40)  # an embedding
    with pytest.warns(ResMemWarning, match=r"outputs that never occur as labels, \d\d% of the time"):
        look_at_base(filled(Multiclass(), outputs, targets))
    wide = torch.cat([logits(targets), torch.full((200, 35), -5.0)], dim=1)  # a head for more classes than there are
    quiet(Multiclass(), wide, targets)


def test_several_labels():
    targets = (torch.rand(200, 3) < 0.2).float()
    with pytest.warns(ResMemWarning, match="the more frequent value of each label alone"):
        look_at_base(filled(Multilabel(), 1 - 2 * targets, targets))
    quiet(Multilabel(), 2 * targets - 1, targets)


def test_a_base_that_was_trained_for_rare_classes_is_no_suspect():
    targets = torch.zeros(1000, dtype=torch.int64)
    targets[:20] = 1
    outputs = 2.0 * F.one_hot(targets, 2)
    outputs[20:220] = torch.tensor([0.0, 1.0])  # every fifth of the frequent class: worse than never saying 1
    assert (outputs.argmax(1) == targets).float().mean() < 0.98
    quiet(Multiclass(), outputs, targets)
    several = F.one_hot(targets, 2).float()
    quiet(Multilabel(), 2 * F.one_hot(outputs.argmax(1), 2).float() - 1, several)


@pytest.mark.parametrize("seed", range(5))
def test_chance_is_no_evidence(seed):
    torch.manual_seed(seed)
    quiet(Multiclass(), torch.randn(200, 5), labels())
    quiet(Regression(), torch.zeros(200, 1), torch.randn(200, 1))
    quiet(Regression(), 16 * torch.randn(20, 1), torch.randn(20, 1))  # too few


class Standardised(Numbers):
    """Trained on targets that its steps standardise."""

    def targets(self, batch):
        return (batch[1] - 50) / 9

    def loss(self, outputs, targets):  # of their own: the first step tells nothing of it
        return sum((outputs[:, i] - targets[:, i]).abs().pow(1.5).mean() for i in range(2))


def test_after_fit_it_is_said(tmp_path):
    data = Data("regression")
    data.train = data.train[0], 50 + 9 * data.train[1]
    with pytest.warns(ResMemWarning, match="mean squared error of .*standardised"):
        trainer(tmp_path, ResMemCallback(LocalMemory(Regression())), max_epochs=5).fit(
            make(Standardised), datamodule=data
        )


def test_after_memorize_it_is_said(tmp_path):
    with pytest.warns(ResMemWarning, match="never occur as labels.*an embedding in the place of the logits"):
        memorize(trainer(tmp_path), make(Embeds, seed=1), Data())

import numpy as np
import torch

from simla_ray.objectives.answers import answer_loss, label_loss


def test_answer_loss_sums_over_an_answer_and_averages_over_rows():
    """Two rows by hand: [CLS] 1 [SEP]=2, and [CLS] 1 1 [SEP]; padding is 0."""
    ids = torch.tensor([[3, 1, 2, 0], [3, 1, 1, 2]])
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = answer_loss(logits, ids)
    log_p = logits.numpy() - np.log(np.exp(logits.numpy()).sum(-1, keepdims=True))
    expected = -(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[1, 0, 1] + log_p[1, 1, 1] + log_p[1, 2, 2]) / 2
    assert abs(float(found.loss) - expected) < 1e-12


def test_answer_accuracy_wants_every_piece_and_the_end():
    ids = torch.tensor([[3, 1, 2, 0], [3, 1, 1, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [1, 1, 1]]), 4).double() * 9
    assert float(answer_loss(logits, ids).metrics["accuracy"]) == 0.5


def test_label_loss_by_hand():
    logits, label = torch.tensor([[0.0, np.log(3.0)], [0.0, 0.0]]), torch.tensor([1, 0])
    found = label_loss(logits, label)
    assert abs(float(found.loss) - (-np.log(0.75) - np.log(0.5)) / 2) < 1e-6
    assert float(found.metrics["accuracy"]) == 1.0


def test_a_row_without_a_label_counts_nowhere():
    logits = torch.tensor([[0.0, np.log(3.0)], [5.0, 0.0]])
    found = label_loss(logits, torch.tensor([1, -100]))
    assert abs(float(found.loss) + np.log(0.75)) < 1e-6
    assert float(found.metrics["accuracy"]) == 1.0
    assert float(label_loss(logits, torch.tensor([-100, -100])).loss) == 0.0

"""Accuracy by time steps and early exit against plain loops over the samples."""

from __future__ import annotations

import math

import pytest
import torch

from trtkern import nn
from trtkern.analysis import Early, Samples, early


class Given(torch.nn.Module):
    """Frames [T, B, C] are the logits."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        return x * self.scale


def entropy(p):
    return 1 + float((p * p.log()).sum()) / math.log(len(p))


@pytest.mark.parametrize("confidence", ["probability", "entropy"])
@pytest.mark.parametrize("batch_size", [3, 11])
def test_against_plain_loops(confidence, batch_size):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(5, 11, 4), torch.arange(11) % 4
    samples = Samples.of("t", (logits, labels), batch_dim=1, batch_size=batch_size)
    levels = [0.5, 0.0, 0.9]
    found = early(Given(), samples, confidence=confidence, thresholds=levels)
    for t in range(5):
        right = [int(logits[: t + 1, b].double().mean(0).argmax()) == labels[b] for b in range(11)]
        assert float(found.correct[t]) == pytest.approx(sum(map(int, right)) / 11)
        alone = [int(logits[t, b].argmax()) == labels[b] for b in range(11)]
        assert float(found.alone[t]) == pytest.approx(sum(map(int, alone)) / 11)
    assert found.thresholds.tolist() == [0.0, 0.5, 0.9, math.inf]
    for k, level in enumerate([0.0, 0.5, 0.9, math.inf]):
        used, right = [], 0
        for b in range(11):
            for t in range(5):
                p = logits[: t + 1, b].double().mean(0).softmax(0)
                sure = float(p.max()) if confidence == "probability" else entropy(p)
                if sure >= level or t == 4:
                    used.append(t + 1)
                    right += int(p.argmax()) == int(labels[b])
                    break
        assert float(found.steps[k]) == pytest.approx(sum(used) / 11)
        assert float(found.exit_correct[k]) == pytest.approx(right / 11)
        spread = torch.tensor(used).double().std(correction=0) / math.sqrt(11)
        assert float(found.steps_error[k]) == pytest.approx(float(spread))
    assert float(found.steps[0]) == 1 and float(found.steps[-1]) == 5
    assert float(found.exit_correct[0]) == float(found.correct[0])
    assert float(found.exit_correct[-1]) == float(found.correct[-1])


def test_what_is_needed():
    # Sure and right after step 1, sure and right after step 2, right at the last step alone.
    logits = torch.zeros(3, 3, 2)
    logits[:, 0, 0], logits[1:, 1, 0] = 20.0, 40.0
    logits[0, 2, 1], logits[2, 2, 0] = 0.1, 1.0
    logits[0, 1, 1] = 0.1
    found = early(Given(), Samples.of("t", (logits, torch.zeros(3, dtype=torch.long)), batch_dim=1))
    assert found.correct.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert found.fixed_needed == 3 and found.needed == pytest.approx(2)
    low, high = found.interval(found.correct)
    # Wilson 1927 for 3 of 3: low = 1 / (1 + z^2 / 3).
    assert float(low[-1]) == pytest.approx(1 / (1 + 1.959964**2 / 3), rel=1e-6) and float(high[-1]) == pytest.approx(1)
    assert "2.00 in the mean" in str(found)


def network():
    torch.manual_seed(0)
    norm = nn.BatchNormLIF(8, channel_dim=-1, v_threshold=0.3)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), norm, torch.nn.Linear(8, 3))


def test_the_first_steps_do_not_know_the_later_ones():
    model, x = network(), torch.randn(6, 9, 6)
    labels = torch.arange(9) % 3
    whole = early(model, Samples.of("t", (x, labels), batch_dim=1))
    assert model.training
    model.eval()
    with torch.no_grad():
        for t in range(1, 7):
            # The same spikes; a product of other height may be summed in another order.
            torch.testing.assert_close(model(x[:t]), model(x)[:t], rtol=1e-5, atol=1e-6)
    for t in range(1, 7):
        part = early(model, Samples.of("t", (x[:t], labels), batch_dim=1))
        assert torch.equal(part.correct, whole.correct[:t]) and torch.equal(part.alone, whole.alone[:t])


class Backward(torch.nn.Module):
    def forward(self, x):
        return x.flip(0).cumsum(0)


def test_errors():
    samples = Samples.of("t", (torch.randn(4, 3, 2), torch.zeros(3, dtype=torch.long)), batch_dim=1)
    with pytest.raises(ValueError, match=r"early: expected the outputs of the first 2 steps not to depend on later"):
        early(Backward(), samples)
    with pytest.raises(ValueError, match="early: confidence: expected one of probability, entropy, got 'entropi'"):
        early(Given(), samples, confidence="entropi")
    with pytest.raises(ValueError, match="early: expected thresholds to be one or more finite numbers"):
        early(Given(), samples, thresholds=[math.nan])
    with pytest.raises(ValueError, match="early: expected margin to be a number from 0 to below 1, got nan"):
        early(Given(), samples, margin=math.nan)
    bad = Samples.of("t", (torch.full((1, 3, 2), math.nan), torch.zeros(3, dtype=torch.long)), batch_dim=1)
    with pytest.raises(ValueError, match="early: expected finite outputs"):
        early(Given(), bad)


def test_the_result(tmp_path):
    found = early(Given(), Samples.of("t", (torch.randn(4, 9, 3), torch.arange(9) % 3), batch_dim=1))
    found.save(tmp_path / "early.json")
    again = Early.load(tmp_path / "early.json")
    assert str(again) == str(found) and torch.equal(again.thresholds, found.thresholds)
    assert len(found.plot(tmp_path / "early.png").axes) == 2 and len(Early.pictures({"a": found, "b": again})) == 2

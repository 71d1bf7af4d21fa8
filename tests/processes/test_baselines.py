"""Baselines: regression and straight flow answer the mean, MIP refines it once; generation keeps the modes they average."""

import pytest
import torch
from torch import nn

from diffpolicy.processes import SamplerConfig, make_plan, sample
from diffpolicy.processes.baselines import (
    Mip,
    MipConfig,
    Regression,
    RegressionConfig,
    StraightFlow,
    StraightFlowConfig,
)
from diffpolicy.processes.flow import Flow, FlowConfig
from tests.processes.exact import MEAN, exact_denoise, noise_of

CPU = torch.device("cpu")
REGRESSION, STRAIGHT, MIP = Regression(RegressionConfig()), StraightFlow(StraightFlowConfig()), Mip(MipConfig())
BASELINES = [REGRESSION, STRAIGHT, MIP]
NAMES = ["regression", "straight_flow", "mip"]


def watched(seen: list, answer=lambda x_t, t: x_t):
    def denoise(x_t, t, condition):
        seen.append((x_t, t))
        return answer(x_t, t)

    return denoise


@pytest.mark.parametrize("process", [REGRESSION, STRAIGHT], ids=NAMES[:2])
def test_direct_baseline_with_the_exact_denoiser_gives_the_mean(process):
    x_T = noise_of(0, 50, 4, 3)
    got = sample(process, exact_denoise(process), x_T, None, SamplerConfig())
    torch.testing.assert_close(got, torch.full_like(got, MEAN))


def test_regression_shows_its_network_zeros_whatever_the_noise():
    x_0, noise = noise_of(0, 5, 4, 3), noise_of(1, 5, 4, 3)
    x_t = REGRESSION.add_noise(x_0, noise, torch.ones(5))
    assert not REGRESSION.network_input(x_t, torch.ones(5)).any()
    seen = []
    sample(REGRESSION, watched(seen), noise, None, SamplerConfig())
    assert len(seen) == 1 and not seen[0][0].any() and (seen[0][1] == 1).all()


def test_straight_flow_is_asked_once_at_pure_noise():
    noise, seen = noise_of(1, 5, 4, 3), []
    sample(STRAIGHT, watched(seen), noise, None, SamplerConfig(num_inference_steps=10))
    assert len(seen) == 1 and torch.equal(seen[0][0], noise) and (seen[0][1] == 1).all()


def test_straight_flow_samples_x0_from_its_velocity():
    x_0, noise = noise_of(0, 5, 4, 3), noise_of(1, 5, 4, 3)
    velocity = STRAIGHT.target(x_0, noise, torch.ones(5))
    torch.testing.assert_close(velocity, noise - x_0)
    torch.testing.assert_close(STRAIGHT.to_x0(velocity, noise, torch.ones(5)), x_0)


@pytest.mark.parametrize("refine", [0.1, 0.4])
def test_mip_is_asked_from_zeros_and_then_at_its_shrunk_answer(refine):
    process, seen = Mip(MipConfig(time_refine=refine)), []
    answer = lambda x_t, t: torch.where(t.view(-1, 1, 1) == 1, torch.full_like(x_t, 0.5), x_t + 0.1)
    got = sample(process, watched(seen, answer), noise_of(0, 2, 4, 3), None, SamplerConfig())
    (first, t_first), (second, t_second) = seen
    assert not first.any() and (t_first == 1).all()
    torch.testing.assert_close(second, torch.full_like(second, 0.5 * (1 - refine)))
    torch.testing.assert_close(t_second, torch.full_like(t_second, refine))
    torch.testing.assert_close(got, second + 0.1)


def test_mip_trains_at_both_of_its_times_by_a_fair_coin():
    t = MIP.sample_time(4000, CPU, torch.Generator().manual_seed(0))
    assert t.unique().tolist() == pytest.approx([0.1, 1.0])
    assert (t == 1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    x_0, noise = noise_of(0, 2, 4, 3), noise_of(1, 2, 4, 3)
    x_t = MIP.add_noise(x_0, noise, torch.tensor([1.0, 0.1]))
    assert not x_t[0].any()
    torch.testing.assert_close(x_t[1], 0.9 * x_0[1] + 0.1 * noise[1])


@pytest.mark.parametrize("refine", [0.0, 1.0, 1.5])
def test_mip_refines_between_data_and_noise_only(refine):
    with pytest.raises(ValueError, match=rf"process.time_refine must be in \(0, 1\), got {refine}"):
        MipConfig(time_refine=refine)


@pytest.mark.parametrize("process", BASELINES, ids=NAMES)
def test_from_x0_inverts_to_x0_and_the_target_means_the_truth(process):
    x_0, noise = noise_of(0, 5, 4, 3), noise_of(1, 5, 4, 3)
    t = process.sample_time(5, CPU)
    x_t = process.add_noise(x_0, noise, t)
    torch.testing.assert_close(process.to_x0(process.target(x_0, noise, t), x_t, t), x_0)
    torch.testing.assert_close(process.from_x0(process.to_x0(noise, x_t, t), x_t, t), noise)


@pytest.mark.parametrize(("process", "calls"), list(zip(BASELINES, (1, 1, 2), strict=True)), ids=NAMES)
def test_baseline_makes_its_own_number_of_calls(process, calls):
    assert make_plan(process, SamplerConfig(num_inference_steps=50)).num_calls == calls


# --- what they average, and what generation keeps ---


class TinyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x_t, t):
        return self.layers(torch.cat([x_t, t.view(-1, 1, 1)], dim=-1))


def trained_chunks(process, modes: tuple[float, float]) -> torch.Tensor:
    """A tiny network is trained on two modes, then sampled: (500,)."""
    torch.manual_seed(0)
    network, generator = TinyNetwork(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(600):
        which = torch.rand(256, 1, 1, generator=generator) < 0.5
        x_0 = torch.where(which, *modes) + 0.02 * torch.randn(256, 1, 1, generator=generator)
        noise, t = torch.randn(256, 1, 1, generator=generator), process.sample_time(256, CPU, generator)
        x_t = process.add_noise(x_0, noise, t)
        loss = (network(x_t, t) - process.target(x_0, noise, t)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    denoise = lambda x_t, t, condition: process.to_x0(network(x_t, t), x_t, t)
    with torch.no_grad():
        return sample(process, denoise, noise_of(1, 500, 1, 1), None, SamplerConfig()).flatten()


@pytest.mark.parametrize("process", [REGRESSION, STRAIGHT], ids=NAMES[:2])
def test_trained_baseline_lands_between_two_modes(process):
    got = trained_chunks(process, (-0.5, 0.5))
    assert got.abs().mean() < 0.15


def test_trained_flow_lands_on_two_modes():
    got = trained_chunks(Flow(FlowConfig()), (-0.5, 0.5))
    assert ((got.abs() - 0.5).abs() < 0.15).float().mean() > 0.9
    assert 0.4 < (got > 0).float().mean() < 0.6

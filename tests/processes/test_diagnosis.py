"""Findings: what is wrong with a setting is said in a label, a reason and a cure; a sound setting is silent."""

import warnings

import pytest
import torch

from diffpolicy.processes import PROCESSES, SamplerConfig, ignored_choices, labels, make_plan, resolve_sampler, sample
from diffpolicy.processes.diagnosis import sampler_findings
from diffpolicy.processes.diffusion import Diffusion, DiffusionConfig
from diffpolicy.processes.flow import Flow, FlowConfig
from tests.processes.exact import diffusion, exact_denoise, noise_of

COSINE = diffusion()


def found(process, action_limit: float | None = None, **choices) -> tuple[str, str]:
    """Label and text of the only finding of a sampler."""
    config = resolve_sampler(process, SamplerConfig(**choices))
    (finding,) = sampler_findings(process, config, make_plan(process, config).times, action_limit=action_limit)
    return finding.label, finding.text


@pytest.mark.parametrize(
    ("schedule", "left", "cure"),
    [
        ("linear", "60%", "process.terminal_snr=scaled"),
        ("scaled_linear", "70%", "process.terminal_snr=scaled"),
        ("laplace", "18%", "process.terminal_snr=zero"),
    ],
)
def test_terminal_signal_is_named_with_how_much_is_left_and_a_cure_that_helps(schedule, left, cure):
    with pytest.warns(UserWarning, match=f"process.schedule={schedule} with 100 steps leaves {left} of the signal"):
        process = Diffusion(DiffusionConfig(schedule=schedule))
    (finding,) = process.findings()
    assert finding.label == f"terminal signal {left}"
    assert cure in finding.text and "process.schedule=cosine" in finding.text
    option, value = cure.removeprefix("process.").split("=")
    cured = diffusion(schedule=schedule, prediction_type="sample", **{option: value})
    assert cured.findings() == []


def test_zero_snr_with_epsilon_is_named_and_samples_without_nan():
    with pytest.warns(UserWarning, match="use process.prediction_type=v_prediction or sample"):
        process = Diffusion(DiffusionConfig(terminal_snr="zero"))
    assert [f.label for f in process.findings()] == ["zero SNR with epsilon"]
    network = lambda x_t, t: torch.sin(x_t)
    denoise = lambda x_t, t, condition: process.to_x0(network(x_t, t), x_t, t)
    for name in ("ddim", "ddpm", "dpmpp_2m", "unipc", "heun"):
        got = sample(process, denoise, noise_of(0, 3, 4, 2), None, SamplerConfig(name=name))
        assert got.isfinite().all() and got.abs().max() <= 1.001 + (name == "heun"), name


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_snr_is_sound_with_other_predictions(prediction_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process = Diffusion(DiffusionConfig(terminal_snr="zero", prediction_type=prediction_type))
    assert process.findings() == []


def test_grid_that_starts_below_pure_noise_is_named():
    label, text = found(COSINE, spacing="leading")
    assert label == "starts at t=0.91"
    assert "sampler.spacing=leading with 10 calls begins at t=0.91" in text and "use sampler.spacing=trailing" in text
    label, text = found(COSINE, timesteps=(49, 9))
    assert label == "starts at t=0.5" and "sampler.timesteps with 2 calls" in text
    assert found(Flow(FlowConfig()), spacing="leading")[0] == "starts at t=0.9"


def test_grid_that_starts_too_low_misses_the_mean_that_trailing_finds():
    x_T = noise_of(0, 20_000, 1, 1)
    denoise = exact_denoise(COSINE, mean=0.6)
    mean = lambda spacing: (
        sample(COSINE, denoise, x_T, None, SamplerConfig(num_inference_steps=2, spacing=spacing)).mean().item()
    )
    assert mean("trailing") == pytest.approx(0.6, abs=0.005)
    assert abs(mean("leading") - 0.6) > 0.03


def test_clipping_below_the_actions_is_named_and_at_them_is_not():
    label, text = found(COSINE, action_limit=2.345, clip_sample=1.0)
    assert label == "clips at 1 of 2.35"
    assert "sampler.clip_sample=null" in text and "normalizer.action=limits" in text
    config = resolve_sampler(COSINE, SamplerConfig(clip_sample=1.0))
    for limit in (None, 0.5, 1.0, 1.0005):
        assert sampler_findings(COSINE, config, (1.0,), action_limit=limit) == []


def test_unclipped_epsilon_is_named_with_how_much_an_error_grows():
    label, text = found(COSINE, clip_sample=None)
    alpha, sigma = COSINE.levels(torch.ones(1, dtype=torch.float64))
    gain = float(sigma / alpha)
    assert gain == pytest.approx(2029, abs=1)  # an error of .01 becomes 20
    assert label == f"unclipped epsilon (error x {gain:,.0f})"
    assert "set sampler.clip_sample=1.0, or predict sample or v_prediction" in text
    x_T = noise_of(0, 1, 1, 1)
    off = COSINE.to_x0(x_T + 0.01, x_T, torch.ones(1)) - COSINE.to_x0(x_T, x_T, torch.ones(1))
    assert off.abs().item() == pytest.approx(0.01 * gain, rel=0.01)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_other_predictions_need_no_clipping(prediction_type):
    assert labels(diffusion(prediction_type=prediction_type), SamplerConfig(clip_sample=None)) == ()


@pytest.mark.parametrize("name", PROCESSES)
def test_default_setting_of_every_process_has_no_findings(name):
    config, process = PROCESSES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels(process(config()), SamplerConfig(), action_limit=1.0) == ()


def test_sigma_grid_that_crowds_into_the_capped_last_step_of_cosine_is_named():
    """sigma / alpha jumps from 64 to 2,029 in that step, and karras puts its large sigmas there."""
    label, text = found(COSINE, spacing="karras")
    assert label == "4 calls in one training step"
    assert "puts 4 of 10 calls between two training steps" in text and "use sampler.spacing=trailing" in text


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras", "exponential"])
@pytest.mark.parametrize("process", [diffusion(schedule="karras"), Flow(FlowConfig())], ids=["karras", "flow"])
def test_grids_that_start_at_pure_noise_have_no_findings(process, spacing):
    assert labels(process, SamplerConfig(spacing=spacing)) == ()


def test_labels_join_what_is_wrong_with_process_and_sampler():
    process = diffusion(schedule="linear")
    got = labels(process, SamplerConfig(spacing="leading", clip_sample=0.5), action_limit=1.0)
    assert got == ("terminal signal 60%", "starts at t=0.91", "clips at 0.5 of 1")


@pytest.mark.parametrize(
    ("choices", "name", "ignored"),
    [
        ({"eta": 0.5}, "euler", ["sampler.eta=0.5"]),
        ({"eta": 0.5}, "ddim", []),
        ({"eta": 0.5, "scheduler": "DDPMScheduler"}, "diffusers", []),
        ({"scheduler": "DDPMScheduler"}, "ddim", ["sampler.scheduler=DDPMScheduler"]),
        (
            {"spacing": "karras", "final_sigma": "sigma_min"},
            "direct",
            ["sampler.spacing=karras", "sampler.final_sigma=sigma_min"],
        ),
        ({"timesteps": (1.0,)}, "two_step", ["sampler.timesteps=(1.0,)"]),
        ({"spacing": "karras"}, "ddim", []),
    ],
)
def test_choices_that_a_sampler_does_not_look_at_are_listed(choices, name, ignored):
    assert ignored_choices(SamplerConfig(**choices), name) == ignored


def test_policy_warns_of_what_is_wrong_with_its_sampler(make_policy):
    policy = make_policy(process={"name": "diffusion"})
    assert policy.findings() == []
    with pytest.warns(UserWarning, match="begins at t=0.91, yet the first x_t is pure noise"):
        policy.use_sampler(SamplerConfig(spacing="leading"))
    with pytest.warns(UserWarning, match="cuts off normalised actions, which reach 1"):
        policy.use_sampler(SamplerConfig(clip_sample=0.5))
    assert [f.label for f in policy.findings()] == ["clips at 0.5 of 1"]
    with pytest.warns(UserWarning, match="nothing clips it"):
        policy.use_sampler(SamplerConfig(clip_sample=None))


def test_policy_knows_no_action_limit_before_its_normaliser_is_fitted(make_policy):
    policy = make_policy()
    assert policy.action_limit() == pytest.approx(1.0)
    policy.normalizer = type(policy.normalizer)(policy.normalizer.shapes, policy.normalizer.modes)
    assert policy.action_limit() is None


@pytest.mark.parametrize(("schedule", "found"), [("cosine", True), ("karras", False)])
def test_heun_from_far_out_is_found(schedule, found):
    process = Diffusion(DiffusionConfig(schedule=schedule, prediction_type="v_prediction"))
    told = labels(process, SamplerConfig(name="heun", num_inference_steps=5))
    assert any("Heun from sigma" in label for label in told) == found
    assert not any("Heun" in label for label in labels(process, SamplerConfig(name="ddim", num_inference_steps=5)))

"""DiffusionPolicy: encode once, denoise many; physical units outside, nothing remembered between calls."""

import pytest
import torch

from diffpolicy.normalizer import Normalizer
from diffpolicy.processes import SamplerConfig
from diffpolicy.processes.flow import Flow
from diffpolicy.spec import Batch, DataSpec, FieldSpec

STATE, WORLD = "observation.state", "observation.environment_state"
SOLVERS = [("diffusion", "ddim"), ("diffusion", "ddpm"), ("diffusion", "unipc"), ("flow", "euler"), ("flow", "heun")]
DENOISERS = {
    "mlp": {"name": "mlp", "width": 16, "depth": 1, "embed_dim": 8},
    "unet": {"name": "unet", "down_dims": [16, 32], "diffusion_step_embed_dim": 8},
    "transformer": {"name": "transformer", "width": 16, "depth": 1, "num_heads": 2},
}


def observation(batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {STATE: torch.rand(batch, 2, 2, generator=generator), WORLD: torch.rand(batch, 2, 3, generator=generator)}


def training_batch(batch: int = 4) -> Batch:
    """The last window runs three steps past its episode."""
    mask = torch.ones(batch, 8, dtype=torch.bool)
    mask[-1, 5:] = False
    actions = 2 + torch.rand(batch, 8, 2, generator=torch.Generator().manual_seed(1))
    return Batch(obs=observation(batch), actions=actions, mask=mask, window=torch.arange(batch))


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def count_calls(module: torch.nn.Module) -> list[int]:
    """Grows by one number, the batch size, with every forward pass."""
    calls: list[int] = []
    module.register_forward_hook(
        lambda _module, _inputs, output: calls.append(len(getattr(output, "global_cond", output)))
    )
    return calls


# --- sampling ---


@pytest.mark.parametrize("num_samples", [1, 5])
def test_encoder_runs_once_per_chunk_however_many_steps_and_samples(tiny_policy, num_samples):
    encoded, denoised = count_calls(tiny_policy.encoder), count_calls(tiny_policy.denoiser)
    tiny_policy.use_sampler(SamplerConfig(num_inference_steps=7))
    tiny_policy.sample_actions(observation(batch=3), num_samples=num_samples)
    assert encoded == [3]
    assert denoised == [3 * num_samples] * 7


def test_encoded_observation_can_be_sampled_again_without_encoding(tiny_policy):
    condition, encoded = tiny_policy.encode(observation()), count_calls(tiny_policy.encoder)
    first = tiny_policy.sample(condition, generators=seeded(1, 2, 3))
    assert torch.equal(first, tiny_policy.sample(condition, generators=seeded(1, 2, 3)))
    assert encoded == []


@pytest.mark.parametrize(("process", "sampler"), SOLVERS)
def test_same_seed_same_chunk_and_another_seed_another(make_policy, process, sampler):
    policy = make_policy(process={"name": process}, sampler={"name": sampler, "num_inference_steps": 3})
    chunk = lambda seed: policy.sample_actions(observation(), generators=torch.Generator().manual_seed(seed))
    assert torch.equal(chunk(0), chunk(0))
    assert not torch.equal(chunk(0), chunk(1))


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize(("process", "sampler"), SOLVERS)
def test_item_of_a_batch_does_not_see_its_neighbours(make_policy, denoiser, process, sampler):
    sections = {"denoiser": DENOISERS[denoiser], "process": {"name": process}, "sampler": {"name": sampler}}
    policy, obs = make_policy(**sections), observation(batch=4)
    together = policy.sample_actions(obs, generators=seeded(1, 2, 3, 4))
    alone = policy.sample_actions({key: value[2:3] for key, value in obs.items()}, generators=seeded(3))
    torch.testing.assert_close(together[2:3], alone, atol=1e-4, rtol=0)


def test_chunk_follows_the_observation(tiny_policy):
    first, second = (tiny_policy.sample_actions(observation(1, seed), generators=seeded(0)) for seed in (0, 1))
    assert (first - second).abs().max() > 1e-4


def test_samples_of_one_observation_lie_beside_each_other_and_differ(tiny_policy):
    obs = observation(batch=2)
    chunks = tiny_policy.sample_actions(obs, num_samples=3, generators=seeded(5, 6))
    assert chunks.shape == (2, 3, 8, 2)
    assert not torch.equal(chunks[0, 0], chunks[0, 1])
    alone = tiny_policy.sample_actions({k: v[1:] for k, v in obs.items()}, num_samples=3, generators=seeded(6))
    torch.testing.assert_close(chunks[1:], alone, atol=1e-5, rtol=0)
    single = tiny_policy.sample_actions(obs, generators=seeded(5, 6))  # the first draw of each generator
    torch.testing.assert_close(chunks[:, 0], single, atol=1e-5, rtol=0)


def test_chunk_is_in_physical_units_within_the_limits_of_the_data(tiny_policy):
    low, high = (tiny_policy.normalizer.get_buffer(f"action:{stat}") for stat in ("min", "max"))
    chunk = tiny_policy.sample_actions(observation(batch=50))
    assert chunk.shape == (50, 8, 2)
    assert (chunk >= low - 1e-5).all() and (chunk <= high + 1e-5).all()
    assert chunk.max() > 2  # normalised actions would end at 1


def test_sampler_is_chosen_at_run_time_on_the_same_weights(make_policy):
    policy = make_policy(process={"name": "diffusion"}, sampler={"name": "ddpm", "num_inference_steps": 20})
    denoised, weights = count_calls(policy.denoiser), {k: v.clone() for k, v in policy.state_dict().items()}
    ddpm = policy.sample_actions(observation(), generators=seeded(0, 1, 2))
    assert policy.use_sampler(SamplerConfig(name="ddim", num_inference_steps=4)) is policy
    ddim = policy.sample_actions(observation(), generators=seeded(0, 1, 2))
    assert len(denoised) == 20 + 4
    assert not torch.equal(ddpm, ddim)
    torch.testing.assert_close(policy.state_dict(), weights, atol=0, rtol=0)


def test_auto_sampler_is_resolved_so_that_results_can_name_it(tiny_policy):
    assert tiny_policy.sampler.name == "euler"


@pytest.mark.parametrize(("process", "calls"), [("regression", 1), ("straight_flow", 1), ("mip", 2)])
def test_baseline_makes_its_own_number_of_calls_and_says_so(make_policy, process, calls):
    policy = make_policy(process={"name": process}, sampler={"num_inference_steps": 50})
    denoised = count_calls(policy.denoiser)
    policy.sample_actions(observation(batch=3))
    assert denoised == [3] * calls
    assert policy.sampler.num_inference_steps == policy.plan.num_calls == calls


@pytest.mark.parametrize("process", ["regression", "mip"])
def test_deterministic_baseline_gives_the_same_chunk_for_every_seed(make_policy, process):
    policy = make_policy(process={"name": process})
    chunk = lambda seed: policy.sample_actions(observation(), generators=torch.Generator().manual_seed(seed))
    assert torch.equal(chunk(0), chunk(1))


def test_initial_noise_of_the_next_chunk_is_the_same_whatever_sampled_this_one(make_policy):
    """So that two samplers are compared on the same noise, chunk by chunk."""
    policy, started = make_policy(process={"name": "diffusion"}), {}
    for name, num_steps in (("ddim", 4), ("ddpm", 20), ("dpmpp_2m_sde", 7)):
        policy.use_sampler(SamplerConfig(name=name, num_inference_steps=num_steps))
        generator, noise = torch.Generator().manual_seed(0), []
        for _ in range(3):
            calls = []
            hook = policy.denoiser.register_forward_pre_hook(lambda _m, inputs, calls=calls: calls.append(inputs[0]))
            policy.sample_actions(observation(), generators=generator)
            hook.remove()
            noise.append(calls[0])
        started[name] = torch.stack(noise)
    assert torch.equal(started["ddim"], started["ddpm"]) and torch.equal(started["ddim"], started["dpmpp_2m_sde"])
    assert not torch.equal(started["ddim"][0], started["ddim"][1])


def test_eta_that_the_sampler_ignores_is_said_aloud(make_policy):
    with pytest.warns(UserWarning, match="sampler.eta=0.5 is ignored: euler does not use it"):
        make_policy(sampler={"eta": 0.5})


def test_sampler_of_another_process_is_refused_and_changes_nothing(tiny_policy):
    before = tiny_policy.sampler
    with pytest.raises(ValueError, match=r"sampler.name=direct cannot sample process 'flow'"):
        tiny_policy.use_sampler(SamplerConfig(name="direct"))
    assert tiny_policy.sampler == before


# --- observations ---


def test_missing_observation_is_named(tiny_policy):
    with pytest.raises(
        ValueError, match=r"the policy needs 'observation.state'; .* holds \['observation.environment_state'\]"
    ):
        tiny_policy.sample_actions({WORLD: torch.zeros(1, 2, 3)})


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 2, 5)])
def test_observation_of_another_shape_is_named_with_both_shapes(tiny_policy, shape):
    with pytest.raises(ValueError, match=r"observation.state must be \(B, T_obs=2, 2\), got \(3, "):
        tiny_policy.sample_actions(observation() | {STATE: torch.zeros(shape)})


def test_states_reach_the_encoder_normalised_and_images_as_they_are(make_policy):
    fields = {
        "observation.images.top": FieldSpec(shape=(40, 48, 3), dtype="uint8"),
        STATE: FieldSpec(shape=(2,), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    }
    encoder = {"name": "resnet", "feature_dim": 8, "num_keypoints": 4}
    policy, seen = make_policy(spec=DataSpec(fields=fields), encoder=encoder), {}
    policy.encoder.register_forward_pre_hook(lambda _module, inputs: seen.update(inputs[0]))
    images = torch.randint(0, 256, (1, 2, 40, 48, 3), dtype=torch.uint8)
    state = observation(1)[STATE]
    policy.sample_actions({"observation.images.top": images, STATE: state, "task": ["push"], "unknown": torch.ones(1)})
    assert seen["observation.images.top"] is images
    torch.testing.assert_close(seen[STATE], policy.normalizer.normalize(STATE, state))
    assert seen["task"] == ["push"] and "unknown" not in seen


def test_policy_without_statistics_gives_no_action_that_looks_right(make_policy):
    policy = make_policy()
    policy.normalizer = Normalizer(policy.normalizer.shapes, policy.normalizer.modes)
    assert policy.sample_actions(observation()).isnan().all()


# --- loss ---


class PerAction(torch.nn.Module):
    """Answers each action by itself, so that what the network sees of its neighbours cannot change its answer."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t, t, condition):
        return torch.sin(x_t) * self.weight


@pytest.mark.parametrize("process", ["diffusion", "flow"])
def test_padded_actions_do_not_change_the_loss_and_recorded_ones_do(make_policy, process):
    policy, batch = make_policy(process={"name": process}), training_batch()
    policy.denoiser = PerAction()

    def loss() -> float:
        return policy.compute_loss(batch, torch.Generator().manual_seed(0)).item()

    before = loss()
    batch.actions[-1, 5:] += 100
    assert loss() == before
    batch.actions[-1, 4] += 0.5
    assert loss() != before


def test_loss_is_the_mean_over_the_recorded_steps(make_policy):
    policy, batch = make_policy(process={"name": "flow", "prediction_type": "sample"}), training_batch()
    for parameter in policy.denoiser.parameters():
        torch.nn.init.zeros_(parameter)  # predicts 0, so that the error is x_0 itself
    x_0 = policy.normalizer.normalize("action", batch.actions)
    expected = x_0[batch.mask].square().mean()  # 4 * 8 - 3 steps
    torch.testing.assert_close(policy.compute_loss(batch), expected)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "edm"])
def test_weighted_loss_of_the_same_x0_is_the_same_whatever_is_predicted(make_policy, prediction):
    """The network answers x_0 = 0 in each currency; min-SNR at most 5 weighs x_0 alike."""
    section = {"name": "diffusion", "prediction_type": prediction, "loss_weight": "min_snr(5)"}
    policy, batch = (
        make_policy(process=section | ({"sigma_data": 0.5} if prediction == "edm" else {})),
        training_batch(),
    )
    process, seen = policy.process, {}

    class AnswersZero(torch.nn.Module):
        def forward(self, x_in, time, condition):
            t = (time + 1) / 100
            x_t = seen["x_t"]
            return process.from_x0(torch.zeros_like(x_t), x_t, t)

    plain = process.add_noise
    process.add_noise = lambda x_0, noise, t: seen.setdefault("x_t", plain(x_0, noise, t))
    policy.denoiser = AnswersZero()
    x_0 = policy.normalizer.normalize("action", batch.actions)
    generator = torch.Generator().manual_seed(0)
    torch.randn(x_0.shape, generator=generator)
    alpha, sigma = process.levels(process.sample_time(len(x_0), x_0.device, generator))
    weight = (alpha / sigma).square().clamp_max(5)[:, None]
    expected = (weight * x_0.square().mean(dim=-1) * batch.mask).sum() / batch.mask.sum()
    got = policy.compute_loss(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_edm_network_sees_chunks_of_unit_size_at_every_time(make_policy):
    policy = make_policy(process={"name": "diffusion", "prediction_type": "edm", "sigma_data": 0.05})
    seen = []
    policy.denoiser.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    noise = torch.randn(200, 8, 2, generator=torch.Generator().manual_seed(0))
    condition = policy.encode(observation(batch=200))
    for time in (0.02, 0.5, 1.0):
        t = torch.full((200,), time)
        x_t = policy.process.add_noise(0.05 * noise.flip(0), noise, t)
        policy.denoise(x_t, t, condition)
    assert [x.std().item() for x in seen] == pytest.approx([1, 1, 1], abs=0.03)


@pytest.mark.parametrize("process", ["diffusion", "flow"])
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_gradient_reaches_every_parameter_of_encoder_and_denoiser(make_policy, denoiser, process):
    encoder = {"name": "state", "hidden_dims": [8], "output_dim": 6}
    policy = make_policy(denoiser=DENOISERS[denoiser], process={"name": process}, encoder=encoder)
    policy.compute_loss(training_batch(16)).backward()
    without = [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_same_generator_same_loss(tiny_policy):
    losses = [tiny_policy.compute_loss(training_batch(), torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


class Oracle(torch.nn.Module):
    """A network that knows x_0 and reads the noise off x_t, which is linear in it."""

    def __init__(self, process, x_0):
        super().__init__()
        self.process, self.x_0 = process, x_0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, condition):
        time = t / 1000 if isinstance(self.process, Flow) else (t + 1) / 100
        nothing, one = torch.zeros_like(x_t), torch.ones_like(x_t)
        sigma = self.process.add_noise(nothing, one, time)
        noise = (x_t - self.process.add_noise(self.x_0, nothing, time)) / sigma
        return self.process.target(self.x_0, noise, time)


@pytest.mark.filterwarnings("ignore:an error of the predicted noise")  # this network makes none
@pytest.mark.parametrize(
    ("process", "prediction"),
    [
        ("diffusion", "epsilon"),
        ("diffusion", "sample"),
        ("diffusion", "v_prediction"),
        ("flow", "velocity"),
        ("flow", "sample"),
    ],
)
def test_network_that_knows_the_answer_has_no_loss_and_samples_it(make_policy, process, prediction):
    section = {"name": process, "prediction_type": prediction}
    policy = make_policy(process=section, sampler={"num_inference_steps": 5, "clip_sample": None})
    actions = torch.full((4, 8, 2), 2.5)
    policy.denoiser = Oracle(policy.process, policy.normalizer.normalize("action", actions))
    batch = Batch(observation(4), actions, torch.ones(4, 8, dtype=torch.bool), torch.arange(4))
    assert policy.compute_loss(batch).item() < 1e-8
    torch.testing.assert_close(policy.sample_actions(observation(4)), actions, atol=1e-3, rtol=0)


def test_a_chunk_may_start_from_a_noised_guess(tiny_policy):
    """Half-noised, a guess decides more of the chunk than pure noise does; without noise it is the chunk."""
    policy = tiny_policy
    condition = policy.encode(
        {k: torch.zeros(2, policy.horizons.obs, *policy.spec.fields[k].shape) for k in policy.spec.state_keys}
    )
    guess = torch.full((2, policy.horizons.pred, policy.spec.action_dim), 0.25)
    kept = policy.sample(condition, start=torch.zeros(2), x_start=guess)
    torch.testing.assert_close(kept, policy.normalizer.unnormalize("action", guess))
    noise = torch.randn(guess.shape, generator=torch.Generator().manual_seed(0))
    whole = policy.sample(condition, start=torch.ones(2), x_start=noise)
    plain = policy.sample(condition, generators=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole, plain, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="belong together"):
        policy.sample(condition, start=torch.ones(2))
    with pytest.raises(ValueError, match=r"x_start must be \(B \* num_samples, T_pred, D_act\)"):
        policy.sample(condition, start=torch.ones(2), x_start=noise[:, :1])

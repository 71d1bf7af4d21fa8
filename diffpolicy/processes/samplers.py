"""Samplers: noise -> x_0 by asking denoise(x_t, t, condition) -> x_0 a few times. Chosen at run time, on any checkpoint.

Every sampler here is linear in what it has seen: the next x is a sum of earlier x, of answers of the network and of fresh
noise. So a sampler is a function (process, config) -> Plan that computes those coefficients once, in float64,
and one loop runs them all: no host synchronisation, no scheduler state. To add one, write such a function and its line in
SAMPLERS at the end, and name it in the `samplers` of its processes.

Noise levels come from `process.levels(t)` alone, so every schedule, and the straight path of a flow, meets every sampler.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpolicy.processes.baselines import Mip, Regression
from diffpolicy.processes.diffusion import Diffusion
from diffpolicy.processes.flow import Flow
from diffpolicy.processes.time_grids import SPACINGS, time_grid
from diffpolicy.spec import Condition, unknown_name

Denoise = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (B, T_pred, D_act), t (B,) or (B, T_pred), condition) -> x_0 (B, T_pred, D_act)."""
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one for each sample, so that a sample's noise does not depend on its neighbours."""
Process = Diffusion | Flow | Regression

FINAL_SIGMAS = ("zero", "sigma_min")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    name: str = "auto"
    """ddim, ddpm, euler, heun, midpoint, dpmpp, dpmpp_2m, dpmpp_sde, dpmpp_2m_sde, unipc or diffusers; auto takes the process's first."""
    num_inference_steps: int = 10
    """Network calls per chunk, whatever the sampler: heun and midpoint spend two on most of their steps. (A scheduler of diffusers
    counts steps instead: its HeunDiscreteScheduler calls 2 n - 1 times.)"""
    spacing: str = "trailing"
    """Which times are visited: trailing, leading, linspace, karras or exponential. trailing starts at pure noise; leading does not."""
    timesteps: tuple[float, ...] | None = None
    """Explicit times instead of a spacing, falling: steps 0 .. T - 1 of a diffusion, times in (0, 1] of a flow."""
    clip_sample: float | None = 1.0
    """Every x_0 estimate is clipped to +- this, in normalised units; null leaves it free."""
    eta: float = 0.0
    """Noise added by ddim: 0 is deterministic, 1 is DDPM. Song et al. 2021, arXiv:2010.02502, Eq. 16."""
    temperature: float = 1.0
    """Size of the initial noise; below 1 favours the most likely chunks."""
    final_sigma: str = "zero"
    """Where the last step ends: zero (on x_0) or sigma_min (on the least noise that was trained)."""
    scheduler: str = "DDIMScheduler"
    """Class of diffusers that steps when name is diffusers."""

    def __post_init__(self):
        if self.name != "auto" and self.name not in SAMPLERS:
            raise unknown_name("sampler.name", self.name, ["auto", *SAMPLERS])
        if self.spacing not in SPACINGS:
            raise unknown_name("sampler.spacing", self.spacing, SPACINGS)
        if self.final_sigma not in FINAL_SIGMAS:
            raise unknown_name("sampler.final_sigma", self.final_sigma, FINAL_SIGMAS)
        if self.timesteps is not None:
            times = tuple(self.timesteps)
            falling = all(a > b for a, b in itertools.pairwise(times))  # False where one is NaN
            if not times or not falling or not all(math.isfinite(t) for t in times):
                raise ValueError(f"sampler.timesteps must be a falling list of times, got {list(times)}")
            object.__setattr__(self, "timesteps", times)
        if self.num_inference_steps < 1:
            raise ValueError(f"sampler.num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if self.clip_sample is not None and not self.clip_sample > 0:
            raise ValueError(f"sampler.clip_sample must be positive or null, got {self.clip_sample}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta must be in [0, 1], got {self.eta}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"sampler.temperature must not be negative, got {self.temperature}")


# --- the one loop ---


@dataclass(frozen=True)
class Step:
    """One call of the network and the update after it.

    The new x is x[0] x + x[1] anchor + x[2] m + x[3] m' + x[4] m'' + noise z, where m, m', m'' are the newest answers
    (estimates of x_0) and z is standard normal; anchor is a second x that two-stage samplers keep.
    """

    t: float
    """Diffusion time of the call."""
    x: tuple[float, ...]
    noise: float = 0.0
    anchor: tuple[float, ...] | None = None
    """Coefficients of the new anchor, over the same old values; None leaves it."""


@dataclass(frozen=True)
class Plan:
    """What a sampler does for a process: coefficients only, no tensors; the same for every chunk."""

    steps: tuple[Step, ...]
    start: float = 1.0
    """Size of the initial noise."""

    @property
    def num_calls(self) -> int:
        """Network calls per chunk (NFE)."""
        return len(self.steps)

    @property
    def times(self) -> tuple[float, ...]:
        """Diffusion times at which the network is called."""
        return tuple(step.t for step in self.steps)


def run_plan(plan: Plan, denoise: Denoise, x_T: Tensor, condition: Condition, generators: Generators = None) -> Tensor:
    """Noise x_T (B, T_pred, D_act) -> x_0, normalised. Fresh noise comes from `noise_generators(generators)`.

    All of it is drawn before the loop: generators may live on the host, and the loop must not wait for it.
    """
    x = x_T if plan.start == 1 else x_T * plan.start
    anchor, answers = x, []
    fresh = noise_generators(generators) if any(step.noise for step in plan.steps) else None
    noise = [draw_noise(x.shape, x.device, fresh) if step.noise else None for step in plan.steps]
    for step, z in zip(plan.steps, noise, strict=True):
        t = torch.full((len(x),), step.t, device=x.device)
        answers = [denoise(x, t, condition), *answers[:2]]
        seen = (x, anchor, *answers)
        x = _combined(step.x, seen)
        if step.anchor is not None:
            anchor = _combined(step.anchor, seen)
        if z is not None:
            x = x + step.noise * z
    return x


def _combined(coefficients: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    parts = [v if c == 1 else c * v for c, v in zip(coefficients, values, strict=False) if c != 0]
    if not parts:
        return torch.zeros_like(values[0])
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def draw_noise(shape: tuple[int, ...], device: torch.device, generators: Generators) -> Tensor:
    """Standard normal noise (B, ...), drawn where the generators live, so that a seed gives the same chunk on any device."""
    if generators is None:
        return torch.randn(shape, device=device)
    if isinstance(generators, torch.Generator):
        return torch.randn(shape, generator=generators, device=generators.device).to(device)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}; give one, or one for each sample")
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generators]).to(device)


def noise_generators(generators: Generators) -> Generators:
    """Generators for the noise that a sampler adds on its way, seeded by the given ones, which they leave untouched.

    So the initial noise of an episode's i-th chunk is the same for every sampler and step count: comparisons are paired.
    A generator that stands in the list several times, once for each sample of an observation, is answered by one that they
    share, so that each of these samples draws noise of its own.
    """
    if generators is None:
        return None
    if isinstance(generators, torch.Generator):
        fork = torch.Generator(generators.device)
        fork.set_state(generators.get_state())
        seed = torch.randint(2**62, (), generator=fork, device=fork.device).item()
        return fork.manual_seed(seed)
    forks = {id(g): noise_generators(g) for g in generators}
    return [forks[id(g)] for g in generators]


def clip_x0(denoise: Denoise, limit: float | None) -> Denoise:
    """The same denoise with every estimate clipped to +- limit: the one visible place where x_0 is clipped."""
    if limit is None:
        return denoise
    return lambda x_t, t, condition: denoise(x_t, t, condition).clamp(-limit, limit)


# --- grids with their noise levels ---


@dataclass(frozen=True)
class Levels:
    """Times of a grid with alpha and sigma of x_t = alpha x_0 + sigma noise, N + 1 numbers each, from noise to data."""

    t: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]

    @property
    def log_ratio(self) -> tuple[float, ...]:
        """log(alpha / sigma), half the log-SNR: -inf at pure noise, inf at the data."""
        return tuple(
            -math.inf if a == 0 else math.inf if s == 0 else math.log(a / s)
            for a, s in zip(self.alpha, self.sigma, strict=True)
        )


def _levels(process: Process, config: SamplerConfig, num_steps: int | None = None) -> Levels:
    times = time_grid(
        process,
        num_steps or config.num_inference_steps,
        spacing=config.spacing,
        timesteps=config.timesteps,
        final_sigma=config.final_sigma,
    )
    return _levels_at(process, times)


def _levels_at(process: Process, times: Sequence[float]) -> Levels:
    alpha, sigma = process.levels(torch.tensor(times, dtype=torch.float64, device="cpu"))
    return Levels(tuple(times), tuple(alpha.tolist()), tuple(sigma.tolist()))


# --- samplers ---


def plan_ddim(process: Process, config: SamplerConfig) -> Plan:
    """DDIM, Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16, for any alpha and sigma.

    Ours and not diffusers', which takes every step to be T // N long: wrong for linspace, and wherever N does not
    divide T. Where the stride is constant both agree. Where x_0 was clipped, the noise direction follows from the
    clipped x_0 (diffusers' use_clipped_model_output=True).
    """
    at, steps = _levels(process, config), []
    for i in range(len(at.t) - 1):
        (a, s), (a_next, s_next) = (at.alpha[i], at.sigma[i]), (at.alpha[i + 1], at.sigma[i + 1])
        fresh = 0.0
        if s_next > 0:
            fresh = config.eta * s_next / (a_next * s) * math.sqrt(max((a_next * s) ** 2 - (s_next * a) ** 2, 0))
        kept = math.sqrt(max(s_next**2 - fresh**2, 0)) / s  # share of the old noise that stays
        steps.append(Step(at.t[i], (kept, 0, a_next - kept * a), fresh))
    return Plan(tuple(steps), config.temperature)


def plan_ddpm(process: Process, config: SamplerConfig) -> Plan:
    """Ancestral sampling, Ho et al. 2020, arXiv:2006.11239, Eq. 7, with the posterior variance (fixed_small): DDIM with eta = 1."""
    return plan_ddim(process, dataclasses.replace(config, eta=1.0))


def plan_euler(process: Process, config: SamplerConfig) -> Plan:
    """Euler steps, on a flow along its velocity, on a diffusion along dx/dsigma as EDM: there it is DDIM.

    With x_0 as currency a step of a flow is x_s = (s/t) x_t + (1 - s/t) x_0.
    """
    if not isinstance(process, Flow):
        return plan_ddim(process, dataclasses.replace(config, eta=0.0))
    t = _levels(process, config).t
    steps = [Step(now, (after / now, 0, 1 - after / now)) for now, after in itertools.pairwise(t)]
    return Plan(tuple(steps), config.temperature)


def plan_heun(process: Process, config: SamplerConfig) -> Plan:
    """Heun's second-order steps, Karras et al. 2022, arXiv:2206.00364, algorithm 1, in sigma / alpha; on a flow in t.

    num_inference_steps counts calls: a Heun step makes two, and the last step, which ends where no slope exists, is
    Euler's. 2 n - 1 calls are n steps as everywhere; an even number makes the first step Euler's too. So is the first
    step from zero terminal SNR, where sigma / alpha has no value.
    """
    calls = len(config.timesteps) if config.timesteps is not None else config.num_inference_steps
    unbounded = not isinstance(process, Flow) and process.terminal_signal == 0
    if config.timesteps is None:
        num_euler = 2 if unbounded else 1
        num_euler += (calls + num_euler) % 2
        num_steps = (calls + num_euler) // 2 if calls > 1 else 1
    else:  # an explicit list names the steps
        num_steps, num_euler = calls, 2 if unbounded else 1
    at = _levels(process, config, num_steps)
    scale, u = _path(process, at)
    num_euler = min(num_euler, num_steps)
    steps = []
    for i in range(num_steps):
        if i < num_euler - 1 or i == num_steps - 1:
            steps.append(_first_order(at, i))
            continue
        ratio, h = u[i + 1] / u[i], u[i + 1] - u[i]
        steps.append(Step(at.t[i], (scale[i + 1] / scale[i] * ratio, 0, scale[i + 1] * (1 - ratio)), anchor=(1, 0, 0)))
        slope, slope_next = h / (2 * u[i]), h / (2 * u[i + 1])
        steps.append(
            Step(
                at.t[i + 1],
                (slope_next, scale[i + 1] / scale[i] * (1 + slope), -scale[i + 1] * slope_next, -scale[i + 1] * slope),
            )
        )
    return Plan(tuple(steps), config.temperature)


def plan_midpoint(process: Process, config: SamplerConfig) -> Plan:
    """The midpoint rule along a flow's velocity: two calls a step; with an odd number of calls the first step is Euler's."""
    calls = len(config.timesteps) if config.timesteps is not None else config.num_inference_steps
    odd = config.timesteps is None and calls % 2
    at = _levels(process, config, None if config.timesteps is not None else (calls + 1) // 2)
    steps = []
    for i, (now, after) in enumerate(zip(at.t[:-1], at.t[1:], strict=True)):
        if i == 0 and odd:
            steps.append(_first_order(at, i))
            continue
        middle = (now + after) / 2
        steps.append(Step(now, (middle / now, 0, 1 - middle / now), anchor=(1, 0, 0)))
        slope = (after - now) / middle
        steps.append(Step(middle, (slope, 1, -slope)))
    return Plan(tuple(steps), config.temperature)


def _path(process: Process, at: Levels) -> tuple[list[float], list[float]]:
    """scale and u with x = scale z and dz/du = (z - x_0) / u: sigma / alpha for a diffusion, t for a flow."""
    if isinstance(process, Flow):
        return [1.0] * len(at.t), list(at.t)
    return list(at.alpha), [math.inf if a == 0 else s / a for a, s in zip(at.alpha, at.sigma, strict=True)]


def _first_order(at: Levels, i: int) -> Step:
    """DDIM's step, which is Euler's and DPM-Solver++'s of first order: the noise seen in x_t is kept and scaled."""
    kept = at.sigma[i + 1] / at.sigma[i]
    return Step(at.t[i], (kept, 0, at.alpha[i + 1] - kept * at.alpha[i]))


def plan_dpmpp(process: Process, config: SamplerConfig, *, order: int = 1, stochastic: bool = False) -> Plan:
    """DPM-Solver++ in data prediction, Lu et al. 2022, arXiv:2211.01095: order 1 is DDIM, order 2 is 2M (algorithm 2).

    stochastic is its SDE form (appendix, SDE-DPM-Solver++). As in diffusers the step that ends on the data is of first order,
    and the last step is when fewer than 15 are made.
    """
    at, steps = _levels(process, config), []
    lam, last = at.log_ratio, len(at.t) - 2
    for i in range(len(at.t) - 1):
        h = lam[i + 1] - lam[i]
        kept = math.exp(-h) if math.isfinite(h) else 0.0  # sigma_next alpha / (alpha_next sigma)
        power = 2 if stochastic else 1
        scale = at.sigma[i + 1] / at.sigma[i] * (kept if stochastic else 1)
        gain = at.alpha[i + 1] * (1 - kept**power)
        fresh = at.sigma[i + 1] * math.sqrt(1 - kept**2) if stochastic else 0.0
        second = order == 2 and i > 0 and not (i == last and (at.sigma[i + 1] == 0 or last + 1 < 15))
        # (m - m') / r with r = h_before / h; where the step before began at pure noise, h_before has no end
        share = 0.5 * h / (lam[i] - lam[i - 1]) if second and math.isfinite(lam[i - 1]) else 0.0
        steps.append(Step(at.t[i], (scale, 0, gain * (1 + share), -gain * share), fresh))
    return Plan(tuple(steps), config.temperature)


def plan_dpmpp_2m(process: Process, config: SamplerConfig) -> Plan:
    """DPM-Solver++(2M)."""
    return plan_dpmpp(process, config, order=2)


def plan_dpmpp_sde(process: Process, config: SamplerConfig) -> Plan:
    """SDE-DPM-Solver++1."""
    return plan_dpmpp(process, config, stochastic=True)


def plan_dpmpp_2m_sde(process: Process, config: SamplerConfig) -> Plan:
    """SDE-DPM-Solver++(2M)."""
    return plan_dpmpp(process, config, order=2, stochastic=True)


def plan_unipc(process: Process, config: SamplerConfig) -> Plan:
    """UniPC-2 with B2(h) = e^h - 1, data prediction, Zhao et al. 2023, arXiv:2302.04867, algorithms 1 to 4.

    Each answer first corrects the x that it was asked at (UniC), then predicts the next (UniP); the anchor is the corrected x.
    """
    at = _levels(process, config)
    lam, num_steps = at.log_ratio, len(at.t) - 1
    order_of = lambda i: max(1, min(2, num_steps - i, i + 1))  # warm-up, and first order at the end, as diffusers
    steps = []
    for i in range(num_steps):
        corrected = [1.0, 0.0, 0.0, 0.0, 0.0]  # over x, anchor, m, m', m''
        if i > 0:
            corrected = _unic(at, lam, i, order_of(i - 1))
        predicted = _unip(at, lam, i, order_of(i))  # over the corrected x, m, m'
        x = [predicted[0] * c for c in corrected]
        x[2] += predicted[1]
        x[3] += predicted[2]
        steps.append(Step(at.t[i], tuple(x), anchor=tuple(corrected)))
    return Plan(tuple(steps), config.temperature)


def _unip(at: Levels, lam: Sequence[float], i: int, order: int) -> tuple[float, float, float]:
    """The predictor from grid point i to i + 1, over (corrected x, m, m')."""
    h = lam[i + 1] - lam[i]
    shrink = math.expm1(-h)  # -1 where the step ends on the data
    kept, gain = at.sigma[i + 1] / at.sigma[i], -at.alpha[i + 1] * shrink
    share = 0.0
    if order == 2 and math.isfinite(lam[i - 1]):
        share = 0.5 * h / (lam[i - 1] - lam[i])  # rho / r, r = (lam' - lam) / h, negative
    return kept, gain * (1 - share), gain * share


def _unic(at: Levels, lam: Sequence[float], i: int, order: int) -> list[float]:
    """The corrector at grid point i for the step from i - 1, over (x, anchor, m, m', m''): m was answered at i."""
    h = lam[i] - lam[i - 1]
    shrink = math.expm1(-h)
    kept, gain = at.sigma[i] / at.sigma[i - 1], -at.alpha[i] * shrink
    rho, rho_now, share = 0.0, 0.5, 0.0
    if order == 2 and math.isfinite(h) and math.isfinite(lam[i - 2]):
        r = (lam[i - 2] - lam[i - 1]) / h
        phi_1 = shrink / -h - 1  # h phi_2 and h phi_3 of the paper, over B(h)
        phi_2 = phi_1 / -h - 0.5
        b_1, b_2 = phi_1 / shrink, phi_2 * 2 / shrink
        rho_now = (b_2 - r * b_1) / (1 - r)  # [[1, 1], [r, 1]] (rho, rho_now) = (b_1, b_2)
        rho = b_1 - rho_now
        share = rho / r
    # kept anchor + gain (m' + rho (m'' - m') / r + rho_now (m - m'))
    return [0.0, kept, gain * rho_now, gain * (1 - share - rho_now), gain * share]


def plan_direct(process: Process, config: SamplerConfig) -> Plan:
    """One call at t = 1: regression and straight flow."""
    return Plan((Step(1.0, (0, 0, 1)),), config.temperature * process.initial_scale)


def plan_two_step(process: Mip, config: SamplerConfig) -> Plan:
    """Two calls: from zeros, then from the first answer shrunk by 1 - t, without noise. Pan et al. 2025, arXiv:2512.01809."""
    t = process.config.time_refine
    return Plan((Step(1.0, (0, 0, 1 - t)), Step(t, (0, 0, 1))), 0.0)


def plan_diffusers(process: Process, config: SamplerConfig) -> Plan:
    """Not a plan of ours: a scheduler of diffusers steps (see stock.py); counts its calls."""
    raise AssertionError("sample() hands this to stock.py")


SAMPLERS: dict[str, Callable[[Process, SamplerConfig], Plan]] = {
    "ddim": plan_ddim,
    "ddpm": plan_ddpm,
    "euler": plan_euler,
    "heun": plan_heun,
    "midpoint": plan_midpoint,
    "dpmpp": plan_dpmpp,
    "dpmpp_2m": plan_dpmpp_2m,
    "dpmpp_sde": plan_dpmpp_sde,
    "dpmpp_2m_sde": plan_dpmpp_2m_sde,
    "unipc": plan_unipc,
    "direct": plan_direct,
    "two_step": plan_two_step,
    "diffusers": plan_diffusers,
}

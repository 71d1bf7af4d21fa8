import torch

from diffpolicy.denoisers.mlp import MlpConfig, MlpDenoiser
from diffpolicy.spec import Condition, ConditionSpec, frame_tokens

COND = ConditionSpec(global_dim=40, groups=frame_tokens(2), token_dim=20)


def test_default_on_pusht_keypoints_has_4_4_million_parameters():
    with torch.device("meta"):
        denoiser = MlpDenoiser(MlpConfig(), action_dim=2, pred_horizon=16, cond=COND)
    assert sum(p.numel() for p in denoiser.parameters()) == 4_408_640


def test_untrained_network_predicts_zero():
    denoiser = MlpDenoiser(MlpConfig(width=32), action_dim=2, pred_horizon=4, cond=COND)
    condition = Condition(torch.randn(3, 40), torch.randn(3, 2, 20))
    assert not denoiser(torch.randn(3, 4, 2), torch.rand(3), condition).any()


def test_weight_decay_spares_the_biases():
    denoiser = MlpDenoiser(MlpConfig(width=32, depth=1), action_dim=2, pred_horizon=4, cond=COND)
    assert all(name.endswith("bias") for name in denoiser.no_weight_decay())
    assert len(denoiser.no_weight_decay()) == 9


def test_a_few_steps_of_training_fit_two_chunks():
    torch.manual_seed(0)
    config = MlpConfig(width=64, depth=2, embed_dim=16)
    cond = ConditionSpec(global_dim=1, groups=frame_tokens(1), token_dim=1)
    denoiser = MlpDenoiser(config, action_dim=2, pred_horizon=4, cond=cond)
    chunks = torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 4, 2)
    condition = Condition(torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1, 1))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    for _ in range(60):
        loss = (denoiser(torch.randn(2, 4, 2), torch.rand(2) * 1000, condition) - chunks).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01

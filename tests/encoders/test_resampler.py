"""Resamplers: a few tokens that look at many patches."""

import pytest
import torch

from diffpolicy.encoders.resampler import AttentionPool, Keypoints, LookAt, PerceiverResampler

P, W, K, D = 10, 12, 3, 16


def build(name, dim=D):
    torch.manual_seed(0)
    if name == "attention_pool":
        return AttentionPool(W, num_tokens=K, dim=dim)
    return PerceiverResampler(W, num_tokens=K, dim=dim, depth=2)


def patches(seed=0):
    return torch.randn(4, P, W, generator=torch.Generator().manual_seed(seed))


NAMES = ("attention_pool", "perceiver")


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_patches_becomes_k_tokens(name):
    resampler = build(name)
    assert resampler(patches()).shape == (4, K, D)
    assert resampler(torch.randn(4, 3 * P, W)).shape == (4, K, D)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_patches_does_not_matter_as_they_carry_their_place(name):
    resampler, order = build(name), torch.randperm(P, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(resampler(patches()[:, order]), resampler(patches()))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_a_batch_do_not_look_at_each_other(name):
    resampler, together = build(name), patches()
    torch.testing.assert_close(resampler(together)[1:2], resampler(together[1:2]))
    together[0] += 1
    torch.testing.assert_close(resampler(together)[1:], resampler(patches())[1:])
    assert not torch.allclose(resampler(together)[0], resampler(patches())[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter_and_every_patch(name):
    resampler, seen = build(name), patches().requires_grad_()
    (resampler(seen) ** 3).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in resampler.parameters())
    assert seen.grad.abs().sum(dim=-1).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_query_finds_one_patch_among_many(name):
    """What a mean over the patches cannot do: say which colour the marked patch has."""
    generator = torch.Generator().manual_seed(0)
    resampler = build(name)
    head = torch.nn.Linear(K * D, 1)
    optimizer = torch.optim.Adam([*resampler.parameters(), *head.parameters()], lr=3e-3)

    def batch(n):
        seen = torch.randn(n, P, W, generator=generator)
        seen[..., 0] = 0.0
        place = torch.randint(P, (n,), generator=generator)
        seen[torch.arange(n), place, 0] = 3.0  # the mark
        return seen, seen[torch.arange(n), place, 1]

    for _ in range(250):
        seen, wanted = batch(128)
        loss = (head(resampler(seen).flatten(1))[:, 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen, wanted = batch(512)
    with torch.no_grad():
        error = (head(resampler(seen).flatten(1))[:, 0] - wanted).square().mean()
    assert error < 0.2  # the variance of what is asked for is 1; the mean over 10 patches leaves 0.9


@pytest.mark.parametrize(("dim", "heads"), [(128, 2), (64, 1), (16, 1), (100, 1)])
def test_heads_are_64_wide_where_the_width_allows(dim, heads):
    assert LookAt(dim).num_heads == heads
    assert build("perceiver", dim)(patches()).shape == (4, K, dim)


def test_one_look_is_multihead_attention_of_torch():
    look = LookAt(128)
    torch_own = torch.nn.MultiheadAttention(128, 2, batch_first=True)
    key, value = look.key_value.weight.chunk(2)
    key_bias, value_bias = look.key_value.bias.chunk(2)
    with torch.no_grad():
        torch_own.in_proj_weight.copy_(torch.cat([look.query.weight, key, value]))
        torch_own.in_proj_bias.copy_(torch.cat([look.query.bias, key_bias, value_bias]))
        torch_own.out_proj.load_state_dict(look.out.state_dict())
    queries, context = torch.randn(2, K, 128), torch.randn(2, P, 128)
    torch.testing.assert_close(look(queries, context), torch_own(queries, context, context)[0])


def test_keypoint_lies_where_its_thing_is():
    keypoints = Keypoints(2, num_patches=16, num_keypoints=2)
    with torch.no_grad():
        keypoints.maps.weight.copy_(10 * torch.eye(2))
    seen = torch.zeros(1, 4, 4, 2)
    seen[0, 0, 3, 0] = 1  # the first thing: top right
    seen[0, 2, 1, 1] = 1  # the second: third row, second column
    places = keypoints(seen.flatten(1, 2))
    torch.testing.assert_close(places, torch.tensor([[[1.0, -1.0], [-1 / 3, 1 / 3]]]), atol=1e-4, rtol=0)


def test_keypoints_begin_apart():
    torch.manual_seed(0)
    patches = torch.nn.functional.layer_norm(torch.randn(8, 64, 32), (32,))
    places = Keypoints(32, num_patches=64, num_keypoints=16)(patches)
    assert places.std(dim=1).mean() > 0.1 and places.abs().max() <= 1

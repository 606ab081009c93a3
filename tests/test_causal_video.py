"""CausVid and Self-Forcing: causality, cache, roll-out, who gets gradients, the options."""

import contextlib
import itertools
import json
import math

import conftest
import pytest
import torch
from conftest import Calls, Gaussian, randomise
from PIL import Image
from torch.testing import assert_close

import causal_objectives as objectives
import causal_video as cv
import edm_teacher as edm
from tools import plot
from tools.drift import drift, fit_shapes

D64 = torch.float64


def cfg(**changes):
    return cv.Config(**{"device": "cpu", "batch": 4} | changes)


def network(seed=0):
    torch.manual_seed(seed)
    return randomise(cv.VideoDenoiser(width=16, depth=2, heads=2), seed).eval()


@pytest.fixture
def net():
    return network()


def videos(n=2, frames=12):
    """Drawn videos and their labels 0, 1, 0, 1 ..."""
    torch.manual_seed(0)
    return cv.bouncing_shapes(n, frames, torch.arange(n) % 2)


class Spy(conftest.Spy):
    """Keeps the results as well, without keys and values: .out"""

    def forward(self, *args, **how):
        result = super().forward(*args, **how)
        self.calls[-1].out = result[0] if isinstance(result, tuple) else result
        return result


class Affine(edm.Denoiser):
    """D = a x_t + c_y with a label y, a x_t + u without: makes formulas of D_real and D_fake."""

    def __init__(self, a, c, u=0.0, size=8):
        super().__init__(torch.nn.Linear(1, 1), (1, 12, size, size), 2)
        self.a, self.c, self.u = a, torch.tensor(c), u

    def forward(self, x, sigma, labels=None):
        return self.a * x + (self.u if labels is None else edm.expand(self.c[labels], x))


class Shown(edm.Denoiser):
    """A student whose video is a parameter: the gradient of the parameter is that on x."""

    def __init__(self, x):
        super().__init__(None, x.shape[1:], 2)
        self.x = torch.nn.Parameter(x.clone())

    def forward(self, x, sigma, labels=None, **how):
        return self.x * 1


def has_gradient(module):
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def same(a, b):
    return torch.equal(flat(a), flat(b))


# ---------------------------------------------------------------- preconditioning and noise


@pytest.mark.parametrize("frames", [1, 4])
def test_denoiser_of_the_exact_velocity_returns_the_clean_video(frames):
    """D = x_t/(1+σ) - σ/(1+σ) F with F = ε - x is x, for a σ per sample and per frame.

    F sees rectified flow's (1-t) x + t ε with t = σ/(1+σ).
    """

    class Exact(cv.VideoDenoiser):
        def velocity(self, x_t, t, labels):
            assert_close(t, (sigma / (1 + sigma)).expand(3, 4))
            t = t[:, None, :, None, None]
            assert_close(x_t, (1 - t) * x + t * eps)
            return eps - x, None, None

    torch.manual_seed(0)
    x, eps = torch.randn(2, 3, 1, 4, 8, 8, dtype=D64)
    sigma = torch.tensor([[0.1], [3.0], [9999.0]], dtype=D64).repeat(1, frames).cumsum(1)
    x_t = x + sigma.reshape(3, 1, -1, 1, 1) * eps
    assert_close(Exact()(x_t, sigma.squeeze(1)), x, rtol=0, atol=1e-9)


def test_sigma_is_a_number_per_sample_or_per_frame_where_0_is_a_clean_frame(net):
    """σ = 0: D = x, which EDM's preconditioning does not define. No label: -1 or None."""
    x, labels = videos()
    out, none = net(x, 0.7, labels), net(x, 0.7)
    for sigma in (torch.full((2,), 0.7), torch.full((2, 12), 0.7)):
        assert torch.equal(net(x, sigma, labels), out)
    changed = net(x, torch.tensor([0.0, 0.7]).repeat(2, 6), labels) != x
    assert not changed[:, :, ::2].any()
    assert changed[:, :, 1::2].any()
    assert torch.equal(net(x, 0.7, torch.tensor([-1, -1])), none)
    for a, b in ((out[0], none[0]), (out[1], none[1]), (out, net(x, 0.7, 1 - labels))):
        assert not torch.allclose(a, b)


def test_flow_loss_is_the_loss_of_the_velocity():
    """((1+σ)/σ)² (D - x)² = (F - (ε - x))² for D made of F."""
    torch.manual_seed(0)
    x, eps, out = torch.randn(3, 5, 1, 2, 4, 4, dtype=D64)
    sigma = torch.tensor([0.01, 0.3, 1.0, 15.0, 9999.0], dtype=D64)
    s = edm.expand(sigma, x)
    denoised = (x + s * eps) / (1 + s) - s / (1 + s) * out
    assert_close(cv.flow_loss(denoised, x, sigma), (out - (eps - x)).square().mean())


# ---------------------------------------------------------------- mask and cache


@pytest.mark.parametrize("window", [(-1, 0), (6, 0), (6, 3), (9, 3), (8, 1)])
@pytest.mark.parametrize("first", [False, True])
def test_mask_and_cache_are_the_same(net, window, first):
    """A block of a roll-out from cached keys and values = one call under the block-causal mask.

    In that call the past is what the roll-out made, at σ = 0, and the block is z at σ_max.
    """
    blocks = cv.block_layout(12 + first, 3, first)
    mask = cv.block_mask(blocks, *window)
    z, labels = torch.randn(2, 1, 12 + first, 8, 8), torch.tensor([0, 1])
    settings = cfg(denoising_steps="1000")
    settings.local_attn_size, settings.sink_size = window
    settings.independent_first_frame = first
    x = cv.generate(net, z, labels, settings)
    for start, end in itertools.pairwise([0, *itertools.accumulate(blocks)]):
        x_t = torch.cat([x[:, :, :start], 9999 * z[:, :, start:end]], 2)
        args = x_t, torch.arange(end).ge(start).expand(2, -1) * 9999.0, labels
        whole = net(*args, mask=mask[:end, :end])[:, :, start:]
        assert_close(x[:, :, start:end], whole, rtol=0, atol=1e-5)
    assert (net(*args)[:, :, start:] - whole).abs().max() > 1e-3  # the mask does something


def test_changing_a_future_frame_leaves_the_past_bit_identical(net):
    """M_ij = 1 iff ⌊j/k⌋ <= ⌊i/k⌋ (CausVid Eq. 5); inside a block all frames see each other."""
    (x, labels), mask, i = videos(), cv.block_mask([3] * 4), torch.arange(12) // 3
    assert torch.equal(mask, i[None, :] <= i[:, None])
    before = net(x, 1.0, labels, mask=mask)
    for b in range(1, 4):
        changed = x.clone()
        changed[:, :, 3 * b] += 1  # the first frame of block b
        difference = (net(changed, 1.0, labels, mask=mask) - before).abs()
        assert difference[:, :, : 3 * b].max() == 0
        assert difference[:, :, 3 * b + 2].max() > 1e-4


def test_rotation_depends_on_differences_of_frame_numbers(net):
    """q · k after rotation is a function of the two frames' distance; lengths stay.

    So the network does not know which frame is the first.
    """
    x, labels = videos()
    assert_close(net(x, 1.0, labels, start=9), net(x, 1.0, labels), rtol=0, atol=1e-5)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 1, 8, dtype=D64)
    q, k = (cv.rotate(v.expand(1, 1, 40, 1, 8), torch.arange(40))[0, 0, :, 0] for v in (q, k))
    dots = q @ k.T
    assert_close([dots[35, 33], dots[2, 0]], [dots[5, 3], dots[5, 3]])
    assert (dots[5, 4] - dots[5, 3]).abs() > 1e-3
    assert_close(q.norm(dim=1), q[:1].norm(dim=1).expand(40))


SEEN = [(-1, 0, range(12)), (6, 0, [9, 10, 11]), (6, 3, [0, 1, 2]), (3, 0, [])]
SEEN += [(9, 3, [0, 1, 2, 9, 10, 11]), (7, 1, [0, 9, 10, 11])]


@pytest.mark.parametrize(("window", "sink", "last_sees"), SEEN)
def test_rolling_cache_holds_the_window_and_the_sink(net, window, sink, last_sees):
    """Five blocks of three: the oldest frames go, the first `sink` stay, as in the mask."""
    mask, spy = cv.block_mask([3] * 5, window, sink), Spy(net)
    assert mask[-1].nonzero().flatten().tolist() == [*last_sees, 12, 13, 14]
    settings = cfg(local_attn_size=window, sink_size=sink)
    cv.generate(spy, torch.randn(1, 1, 15, 8, 8), torch.tensor([0]), settings)
    assert list(spy.calls[-1].how["past"]) == list(last_sees)


def test_last_block_of_a_training_video_may_be_kept_from_the_first(net):
    """Self-Forcing's remedy for rolling caches: never used to the first frames being there."""
    settings, labels = cfg(hide_first_block=True, local_attn_size=-1), torch.tensor([0])
    z, spy = torch.randn(1, 1, 12, 8, 8), Spy(net)
    for training, wanted in [(True, range(3, 9)), (False, range(9))]:
        cv.rollout(spy, z, labels, settings, training=training)
        assert list(spy.calls[-1].how["past"]) == list(wanted)
        assert list(spy.calls[-6].how["past"]) == list(range(6))  # the last block but one
    cv.student_video("causvid", spy, z, labels, settings)
    assert not spy.calls[-1].how["mask"][9:, :3].any()
    assert spy.calls[-1].how["mask"][6:9, :3].all()


# ---------------------------------------------------------------- the roll-out


def test_roll_out_continues_its_own_outputs_with_fresh_noise_between_steps(net):
    """Each block: exit + 1 denoising calls, then one for the cache with the exit step's output.

    x_(k+1) = x̂ + σ_(k+1) ε: the differences are new unit noise.
    """
    torch.manual_seed(0)
    spy, z = Spy(net), torch.randn(64, 1, 6, 8, 8)
    x, calls = cv.rollout(spy, z, torch.arange(64) % 2, cfg(), [1, 2]), spy.calls
    levels = [c.sigma.item() for c in calls]
    assert_close(levels, [9999.0, 15.0, 0.0, 9999.0, 15.0, 5.0, 0.0], rtol=1e-5, atol=0)
    assert_close(torch.cat([calls[0].x, calls[3].x], 2), 9999 * z, rtol=1e-5, atol=0)
    assert torch.equal(calls[2].x, calls[1].out)
    assert torch.equal(x, torch.cat([calls[1].out, calls[5].out], 2))
    assert [c.how["start"] for c in calls] == [0] * 3 + [3] * 4
    assert [list(c.how["past"]) for c in calls] == [[]] * 3 + [[0, 1, 2]] * 4
    eps = [(calls[k].x - calls[k - 1].out) / calls[k].sigma for k in (1, 4, 5)]
    eps = torch.stack([v.flatten() for v in (z[:, :, :3], z[:, :, 3:], *eps)])
    assert_close(eps.std(1), torch.ones(5), rtol=0.03, atol=0)
    assert (torch.corrcoef(eps) - torch.eye(5)).abs().max() < 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_a_roll_out_is_that_of_its_exit_calls(net, checkpointing, monkeypatch):
    """∂/∂θ of the video = sum over blocks of ∂/∂θ of one call, its input and cache constant.

    Steps before it and the calls that fill the cache get none. Checkpointing computes the two
    layers of each such call again and changes nothing.
    """
    used, recompute, weights = [], cv.recompute, list(net.parameters())
    monkeypatch.setattr(cv, "recompute", lambda *a, **how: used.append(a) or recompute(*a, **how))
    spy, net.checkpointing = Spy(net), checkpointing
    args = torch.randn(2, 1, 9, 8, 8), torch.tensor([0, 1]), cfg(), [2, 0, 1]
    video = cv.rollout(spy, *args, training=True)
    found = torch.autograd.grad(video.pow(3).sum(), weights)
    assert [c.grad for c in spy.calls] == [0, 0, 1, 0, 1, 0, 0, 1, 0]
    assert len(used) == 6 * checkpointing
    net.checkpointing, loss = False, 0
    for call in (spy.calls[i] for i in (2, 4, 7)):
        cached = [v for layers in call.how["past"].values() for kv in layers for v in kv]
        assert not any(v.requires_grad for v in (call.x, *cached))
        loss = loss + net(call.x, call.sigma, call.labels, **call.how).pow(3).sum()
    for grad, wanted in zip(found, torch.autograd.grad(loss, weights), strict=True):
        assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


def test_only_the_last_frames_of_a_long_roll_out_get_gradient(net):
    """24 frames: no graph for the first 12, which are context."""
    spy = Spy(net)
    cv.rollout(spy, torch.randn(1, 1, 24, 8, 8), torch.tensor([0]), cfg(), [0] * 8)
    assert [c.grad for c in spy.calls[::2]] == [False] * 4 + [True] * 4


def test_context_noise_is_a_label_and_in_training_also_noise(net):
    """context_noise 500: the cache is written at σ = 1. In sampling the network, whose c_in is then
    1/2, gets the clean frames themselves, as in Self-Forcing."""
    spy, args = Spy(net), (torch.randn(8, 1, 3, 8, 8), torch.tensor([0] * 8))
    for training in (False, True):
        x = cv.rollout(spy, *args, cfg(context_noise=500.0), training=training)
        context = spy.calls[-1]
        assert_close(context.sigma.item(), 1.0, rtol=1e-6, atol=0)
        if not training:
            assert_close(context.x / 2, x)
    assert_close((context.x - x).std().item(), 1.0, rtol=0, atol=0.06)


# ---------------------------------------------------------------- the two methods


def test_causvid_trains_on_noised_real_videos_under_the_mask(net):
    """Each block of each sample has one of the steps' σ or 0, of its own (CausVid Alg. 1)."""
    spy, (real, labels) = Spy(net), videos(400)
    x, window, first = cv.student_video("causvid", spy, real, labels, cfg())
    (call,) = spy.calls
    assert x is call.out
    assert (window, first) == ((0, 1000), 0)
    by_block = call.sigma.unflatten(1, (4, 3))
    assert torch.equal(by_block, by_block[..., :1].expand_as(by_block))
    levels = torch.tensor([9999.0, 15.0, 5.0, 5 / 3, 0.0])
    share = (by_block[..., 0, None] - levels).abs() < 1e-2
    assert share.any(-1).all()
    assert_close(share.float().mean((0, 1)), torch.full((5,), 0.2), rtol=0, atol=0.05)
    assert torch.equal(call.how["mask"], cv.block_mask([3] * 4, 6))
    noise = (call.x - real).flatten(3).std(-1)[:, 0]
    assert_close(noise, call.sigma, rtol=0.5, atol=1e-6)


@pytest.mark.parametrize(("first", "clip", "longest"), [(False, 12, 24), (True, 10, 22)])
def test_self_forcing_trains_on_the_end_of_its_own_roll_out(net, monkeypatch, first, clip, longest):
    """12 to 24 frames from unit noise, left at one random step; scores see the last 12.

    Of a longer roll-out the loss leaves the first block out: one frame, where that is the first
    block. The real video is never looked at.
    """
    rollouts = Calls(monkeypatch, cv, "rollout")
    settings = cfg(last_step_only=False, ts_schedule=True, ts_schedule_max=True)
    settings.independent_first_frame, settings.num_training_frames = first, longest
    real, labels = torch.full((2, 1, clip, 8, 8), torch.nan), torch.tensor([0, 1])
    for _ in range(25):
        with torch.no_grad():
            x, window, skipped = cv.student_video("self_forcing", net, real, labels, settings)
        call = rollouts[-1]
        assert x.isfinite().all()
        assert torch.equal(x, call.result[:, :, -clip:])
        assert window == cv.score_window(call.exits, settings)
        assert skipped == (call.z.shape[2] > clip) * (1 if first else 3)
    assert all(call.training for call in rollouts)
    assert {call.z.shape[2] for call in rollouts} == {*range(clip, longest + 1, 3)}
    assert {call.exits[0] for call in rollouts} == {0, 1, 2, 3}
    z = torch.cat([call.z.flatten() for call in rollouts])
    assert_close([z.mean().item(), z.std().item()], [0.0, 1.0], rtol=0, atol=0.02)


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("mode", ["causvid", "self_forcing"])
def test_each_step_reaches_its_network_alone_and_every_call_has_the_labels(net, mode, objective):
    """Step A: the generator. Step B: the fake, and for a GAN the discriminator."""
    spies = generator, teacher, fake = Spy(net), Spy(network(1)), Spy(network(2))
    settings, real, head = cfg(objective=objective), videos(4), objectives.Discriminator(net)
    loss, made, _ = cv.generator_step(generator, teacher, fake, head, settings, mode, *real)
    loss.backward()
    assert [has_gradient(n) for n in (*spies, head)] == [True, False, False, False]
    assert not made[0].requires_grad
    generator.zero_grad()
    cv.fake_step(fake, head, settings, *made, *real)[0].backward()
    assert [has_gradient(n) for n in (*spies, head)] == [False, False, True, objective == "gan"]
    assert all(torch.equal(call.labels, real[1]) for spy in spies for call in spy.calls)


def test_loss_begins_at_its_first_frame_and_both_steps_stay_in_the_window(monkeypatch):
    """Shift 5: timesteps [250, 500) become [625, 833.3)."""
    x = torch.zeros(40, 1, 12, 8, 8, requires_grad=True)
    monkeypatch.setattr(cv, "student_video", lambda *args: (x * 1, (250, 500), 3))
    real, fake = Spy(Gaussian(0.3, 0.5)), Spy(Gaussian(-0.2, 0.9))
    args = None, real, fake, None, cfg(), "self_forcing", x.detach(), None
    loss, (made, limits), _ = cv.generator_step(*args)
    loss.backward()
    assert x.grad[:, :, :3].abs().max() == 0
    assert (x.grad[:, :, 3:] != 0).all()
    cv.fake_step(fake, None, cfg(), made, limits, None, None)
    for call in (*real.calls, *fake.calls):
        t = 1000 * call.sigma / (1 + call.sigma)
        assert t.min() > 624.9
        assert t.max() < 833.4


def step_with_known_scores(objective, w_real, w_fake):
    """generator_step with r = 0.7 x_t + ... and f = 0.4 x_t + ..., each c + w (c - u).

    -> (x, r, f, numel dL/dx, log, labels of the teacher's calls, of the fake's)
    """
    x, labels = videos(4)
    x = torch.cat([x, x.flip(3)], 1)  # two channels
    student = Shown(x)
    spies = Spy(Affine(0.7, (0.3, -0.2), -0.4)), Spy(Affine(0.4, (-0.1, 0.5), 0.8))
    settings = cfg(objective=objective, real_score_guidance_scale=w_real)
    settings.fake_score_guidance_scale = w_fake
    loss, _, log = cv.generator_step(student, *spies, None, settings, "causvid", x, labels)
    loss.backward()
    call, scores = spies[0].calls[0], []
    for spy, w in zip(spies, (w_real, w_fake), strict=True):
        assert all(torch.equal(c.x, call.x) and torch.equal(c.sigma, call.sigma) for c in spy.calls)
        c, u = edm.expand(spy.model.c[labels], x), spy.model.u
        scores.append((spy.model.a * call.x + c + w * (c - u)).detach())
    assert call.sigma.shape == (4,)  # one for all frames of a video
    asked = [[c.labels for c in spy.calls] for spy in spies]
    return x, *scores, student.x.grad * x.numel(), log, *asked


@pytest.mark.parametrize(("w_real", "w_fake"), [(0.0, 0.0), (3.0, 0.5)])
def test_dmd_gradient_on_the_video_is_the_weighted_difference_of_scores(w_real, w_fake):
    """numel dL/dx = (f - r) / mean|x - r|, r = D_real, f = D_fake at one x_t  (DMD Eq. 7, 8).

    Guidance is Self-Forcing's c + w (c - u); w = 0 asks no unconditional score.
    """
    x, r, f, found, log, *asked = step_with_known_scores("dmd", w_real, w_fake)
    grad = (f - r) / (x - r).abs().mean((1, 2, 3, 4), keepdim=True)
    assert_close(found, grad, rtol=1e-4, atol=1e-5)
    assert_close(log["|grad|"], grad.square().mean().sqrt())
    assert_close(log["|D_fake - D_real|"], (f - r).abs().mean())
    for labels, w in zip(asked, (w_real, w_fake), strict=True):
        assert [y is None for y in labels] == [False, True][: 1 + (w > 0)]


@pytest.mark.parametrize("w", [0.0, 3.0])
def test_sid_guides_the_teacher_with_1_plus_w_and_calls_the_fake_once_conditionally(w):
    """L = mean v (r-f)(f-x), v = 1/mean|x-r|: sid_loss with α = 1, r = c + w (c - u).

    As both scores are differentiated, numel dL/dx = v ((a-b)(f-x) + (r-f)(b-1)), a and b their
    slopes. As in Self-Forcing's code the fake has no guidance.
    """
    x, r, f, found, log, of_teacher, of_fake = step_with_known_scores("sid", w, 0.0)
    v = 1 / (x - r).abs().mean((1, 2, 3, 4), keepdim=True)
    assert_close(found, v * (0.3 * (f - x) - 0.6 * (r - f)), rtol=1e-3, atol=1e-5)
    assert_close(log["SiD loss"], (v * (r - f) * (f - x)).mean())
    assert [y is None for y in of_teacher] == [False, True][: 1 + (w > 0)]
    assert [y is None for y in of_fake] == [False]


def test_fake_learns_flow_matching_on_generated_videos():
    """mean ((1+σ)/σ)² (D(x + σ ε) - x)², x generated: the real video plays no part."""
    torch.manual_seed(0)
    x, fake, labels = torch.randn(64, 1, 12, 2, 2), Spy(Affine(0.6, (0.3, -0.2))), torch.arange(64)
    loss, log = cv.fake_step(fake, None, cfg(), x, (0, 1000), x + 7, labels % 2)
    (call,) = fake.calls
    eps = (call.x - x) / edm.expand(call.sigma, x)
    assert_close(eps.std(), torch.tensor(1.0), rtol=0, atol=0.05)
    error = (call.out - x).square().mean((1, 2, 3, 4))
    assert_close(loss, ((1 + 1 / call.sigma) ** 2 * error).mean())
    assert loss is log["fake loss"]


# ---------------------------------------------------------------- the other two objectives


def test_sid_loss_and_its_gradient_through_both_scores():
    """r = a x, f = b x: L = w (a-b)((a-1) - α(a-b)) x², w constant; so dL/dx = 2 L / x."""
    torch.manual_seed(0)
    x, a, b, alpha = torch.randn(3, 1, 2, 4, 4, dtype=D64), 0.7, 0.4, 1.2
    loss, grad = objectives.gradient_at(x, lambda x: objectives.sid_loss(x, a * x, b * x, alpha))
    w = 1 / ((1 - a) * x.abs()).mean((1, 2, 3, 4), keepdim=True)
    each = w * (a - b) * ((a - 1) - alpha * (a - b)) * x**2
    assert_close(loss, each.mean())
    assert_close(grad, 2 * each / x)


def test_gan_pushes_the_video_up_and_the_discriminator_the_other_way(net, monkeypatch):
    """Generator: better = its own; discriminator: better = real; all at one σ and label.

    Here the logit is the mean of x_t. R1 and R2, slopes on real and generated, count alike.
    """
    monkeypatch.setattr(objectives, "GAN_PENALTY", 1e3)
    seen, settings, (real, labels) = [], cfg(objective="gan"), videos(4)

    def head(backbone, x_t, sigma, y):
        assert torch.equal(y, labels)
        seen.append((x_t.detach(), sigma, x_t.flatten(1).mean(1)))
        assert torch.equal(sigma, seen[0][1])
        return seen[-1][-1]

    made = 100 * torch.tensor([1.0, -1.0]).repeat(4, 1, 12, 8, 4)  # unlike the real one
    student = Shown(made)
    loss, _, log = cv.generator_step(student, None, net, head, settings, "causvid", real, labels)
    loss.backward()
    assert_close((seen[0][0] - made).std((1, 2, 3, 4)), seen[0][1], rtol=0.1, atol=0)
    d = (seen[0][-1] - seen[1][-1]).detach()
    slope = edm.expand(-torch.sigmoid(-d) / real.numel(), real).expand_as(real)
    assert_close(student.x.grad, slope, rtol=1e-2, atol=1e-7)
    assert_close(log["GAN loss"], -torch.sigmoid(d).log().mean())
    seen.clear()
    loss, log = cv.fake_step(net, head, settings, made, (0, 1000), real, labels)
    (x_t, *_), (sigma, *_), logits = zip(*seen, strict=True)
    assert_close((x_t - real).std((1, 2, 3, 4)), sigma, rtol=0.1, atol=0)
    for clean, close, name in ((0, 2, "R1"), (1, 3, "R2")):
        shift = seen[close][0] - seen[clean][0]
        assert_close(shift.std().item(), objectives.GAN_STD, rtol=0.1, atol=0)
        slope = (logits[close] - logits[clean]) / objectives.GAN_STD
        assert_close(log[name], slope.square().mean())
    penalty = 1e3 * (log["R1"] + log["R2"]) / 2
    assert_close(loss, -torch.sigmoid(logits[0] - logits[1]).log().mean() + penalty)


def test_discriminator_judges_each_video_alone_and_trains_the_fakes_encoder(net, monkeypatch):
    """A query for each of two layers; without the penalty, too."""
    (x, labels), head = videos(4), objectives.Discriminator(net)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    args = x, torch.tensor([0.1, 1.0, 5.0, 0.5]), labels
    together, alone = head(net, *args), [head(net, *(v[i : i + 1] for v in args)) for i in range(4)]
    assert_close(together, torch.cat(alone))
    assert together.std() > 1e-3
    monkeypatch.setattr(objectives, "GAN_PENALTY", 0.0)
    args = net, head, cfg(objective="gan"), x.flip(0), (0, 1000), x, labels
    cv.fake_step(*args)[0].backward()
    assert net.blocks[0].qkv.weight.grad.abs().max() > 1e-6
    assert (head.query.grad.abs().amax((1, 2, 3)) > 0).tolist() == [True, True]


# ---------------------------------------------------------------- ODE initialisation


def test_ode_path_follows_the_exact_flow_through_the_students_levels():
    """N(m, s²): x(σ) = m + (x_0 - m) √((s² + σ²)/(s² + σ_max²)), exact for s = 0.

    Else Euler's error falls with its step; steps are even in u = σ/(5+σ), before a shift of 5.
    """
    z, sigmas, errors = torch.randn(50, 1, 1, 2, 2), cv.student_sigmas(cfg()), []
    for std, substeps in [(0.0, 1), (0.0, 4), (0.5, 4), (0.5, 16), (0.5, 64)]:
        teacher = Gaussian(0.3, std)
        path = cv.ode_path(teacher, z, None, sigmas, substeps, 1.0)
        ratio = ((std**2 + sigmas**2) / (std**2 + 9999**2)).sqrt()
        exact = 0.3 + ratio[:, None, None, None, None] * (9999 * z[:, None] - 0.3)
        errors.append((path - exact)[:, 1:].abs().max().item())
        u, called = (sigmas / (5 + sigmas)).tolist(), torch.stack(teacher.calls)[:, 0]
        wanted = [torch.linspace(*ab, substeps + 1)[:-1] for ab in itertools.pairwise(u)]
        assert_close(called / (5 + called), torch.cat(wanted), rtol=1e-4, atol=1e-6)
    assert max(errors[:2]) < 1e-3
    assert errors[4] < 0.4 * errors[3] < 0.16 * errors[2]


def test_ode_paths_end_where_guidance_and_their_own_label_lead():
    """Points c_y as data: a path ends in c + w (c - u) of its label, in each batch of 256.

    16 Euler steps are 4 in each of 4 intervals. z is of its own, not the verdict's.
    """
    teacher = Spy(Affine(0.0, (0.25, -0.5), 0.125, size=2))
    settings = cfg(pairs=300, real_score_guidance_scale=3.0)
    path, labels = cv.make_paths(settings, teacher).values()
    assert torch.equal(labels, torch.arange(300) % 2)
    ends = torch.tensor([0.25 + 3 * 0.125, -0.5 - 3 * 0.625])[labels]
    assert_close(path[:, -1], edm.expand(ends, path[:, -1]).expand(300, 1, 12, 2, 2))
    assert len(teacher.calls) == 2 * 16 * 2  # batches, steps, with and without label
    z = path[:, 0] / 9999
    assert_close(z.std().item(), 1.0, rtol=0, atol=0.02)
    assert len({v.item() for v in z[:, 0, 0, 0, 0]}) == 300
    assert not torch.allclose(z, cv.video_noise(teacher, 300, 12, settings.seed + 20000))


def test_ode_initialisation_regresses_each_block_from_its_own_level(net, monkeypatch):
    """Inputs are states of a path at the block's σ; clean frames do not count (CausVid Eq. 6).

    Under the window, each path with its own label; the student starts from the teacher.
    """
    spy, losses, drawn, teacher = Spy(net), [], [], network(1)
    monkeypatch.setattr(cv, "regress", lambda *args: losses.append(args[-1](spy)) or args[2])
    monkeypatch.setattr(cv, "pictures", lambda *args: drawn.append(args[2:5]))
    pairs = {"path": torch.randn(2, 5, 1, 12, 8, 8), "labels": torch.tensor([0, 1])}
    assert cv.train_ode(cfg(pairs=2, batch=32), None, teacher, pairs) is teacher
    assert drawn == [(teacher, teacher, teacher)]
    (call,) = spy.calls
    assert {*call.labels.tolist()} == {0, 1}
    assert torch.equal(call.how["mask"], cv.block_mask([3] * 4, 6))
    path = pairs["path"][call.labels, :, 0]
    for k, level in enumerate(cv.student_sigmas(cfg())):
        there = call.sigma == level
        assert there.float().mean() > 0.1
        assert torch.equal(call.x[:, 0][there], path[:, k][there])
    error = (call.out[:, 0] - path[:, -1]).square()
    assert_close(losses, [error[call.sigma > 0].mean()])


def test_teacher_is_trained_with_shift_5_and_a_tenth_without_label(net, monkeypatch):
    """σ = 5 u/(1-u), u uniform: median 5."""
    spy = Spy(net)
    monkeypatch.setattr(cv, "regress", lambda *args: args[-1](spy))
    cv.train_teacher(cfg(batch=1000), None)
    (call,) = spy.calls
    assert_close((call.labels == -1).float().mean(), torch.tensor(0.1), rtol=0, atol=0.03)
    assert_close(call.sigma.median(), torch.tensor(5.0), rtol=0.15, atol=0)


# ---------------------------------------------------------------- the options' arithmetic


def test_time_shift_is_a_factor_on_sigma():
    """t' = 1000 k τ/(1 + (k-1) τ) is σ' = k σ; 1/k undoes it. CausVid's 757, 522 have k = 8."""
    found = [cv.shift_timestep(1000 * (1 - i / 50), 8.0) for i in (36, 44)]
    assert_close(found, [756.756757, 521.739130], rtol=1e-6, atol=0)
    for t in (1.0, 20.0, 333.0, 980.0):
        before, after = cv.sigma_of([t, cv.shift_timestep(t, 7.0)]).tolist()
        assert_close(after, 7 * before, rtol=1e-6, atol=0)
        assert_close(cv.shift_timestep(cv.shift_timestep(t, 7.0), 1 / 7), t, rtol=1e-9, atol=0)


def test_denoising_steps_are_meant_before_or_after_the_shift():
    """σ = τ/(1-τ), τ = t/1000 up to 0.9999, then 0; --warp-denoising-step: times the shift."""
    for text, warp, shift, wanted in [
        ("1000,750,500,250", True, 5.0, [9999, 15, 5, 5 / 3, 0]),
        ("1000,750,500,250,0", True, 1.0, [9999, 3, 1, 1 / 3, 0]),
        ("1000,757,522", False, 8.0, [9999, 757 / 243, 522 / 478, 0]),
    ]:
        how = {"denoising_steps": text, "warp_denoising_step": warp, "timestep_shift": shift}
        sigmas = cv.student_sigmas(cfg(**how))
        assert_close(sigmas, torch.tensor(wanted), rtol=1e-6, atol=0)


def test_a_clip_is_as_many_blocks_as_the_teacher_knows_a_roll_out_three_clips():
    for changes, clip, frames in [
        ({}, [3] * 4, 36),
        ({"num_training_frames": 6}, [3, 3], 18),
        ({"num_training_frames": 20, "num_frame_per_block": 5}, [5, 5], 30),
        ({"num_training_frames": 22, "independent_first_frame": True}, [1, 3, 3, 3], 28),
    ]:
        assert cv.clip_blocks(cfg(**changes), 12) == clip
        assert cv.long_frames(cfg(**changes), network()) == frames


def test_exit_steps():
    """Uniform over the steps, one for all blocks or each its own; or always the last."""
    torch.manual_seed(0)
    for same in (True, False):
        settings = cfg(last_step_only=False, same_step_across_blocks=same)
        drawn = torch.tensor([cv.exit_steps(7, 4, settings) for _ in range(400)])
        assert (drawn == drawn[:, :1]).all() == same
        share = torch.stack([(drawn == k).float().mean(0) for k in range(4)])
        assert_close(share, torch.full_like(share, 0.25), rtol=0, atol=0.07)
    assert cv.exit_steps(7, 4, cfg()) == [3] * 7


@pytest.mark.parametrize("flags", [*itertools.product([False, True], repeat=3)])
def test_score_windows_for_every_combination_of_flags(flags):
    """Exit e: from 1000 - 250 e to 1000 - 250 (e + 1); lower end, upper end, or [min, 1000)."""
    schedule, schedule_max, same = flags
    settings = cfg(ts_schedule=schedule, ts_schedule_max=schedule_max, min_score_timestep=100)
    settings.same_step_across_blocks = same
    for e, (high, low) in enumerate([(1000, 750), (750, 500), (500, 250), (250, 0)]):
        wanted = (low if schedule and same else 100, high if schedule_max and same else 1000)
        assert cv.score_window([e] * 4, settings) == wanted
    assert cv.score_window(None, settings) == (100, 1000)  # CausVid has no exit step
    settings.warp_denoising_step, settings.denoising_steps = False, "1000,938,833,625"
    wanted = (499 if schedule and same else 100, 752 if schedule_max and same else 1000)
    assert cv.score_window([1] * 4, settings) == wanted  # steps after the shift are taken back


def test_score_timesteps_are_drawn_then_shifted_then_clamped():
    """Shift 5 on {0 ... 999}, clamp [20, 980]: mean 745.7, and 9.2 % exactly at 980."""
    torch.manual_seed(0)
    sigma = cv.score_sigma(200_000, (0, 1000), cfg()).double()
    t = 1000 * sigma / (1 + sigma)
    assert_close(t.mean().item(), 745.7, rtol=0, atol=1.5)
    assert_close((t > 979.99).double().mean().item(), 0.092, rtol=0, atol=0.003)
    assert_close([t.min().item(), t.max().item()], [20.0, 980.0], rtol=1e-5, atol=0)
    off = cfg(timestep_shift=1.0, min_timestep_ratio=1e-9, max_timestep_ratio=1.0)
    assert_close(cv.score_sigma(9, (500, 501), off), torch.full((9,), 500 / 500))


IMPOSSIBLE = [
    ({"objective": "sid", "fake_score_guidance_scale": 1.0}, "only --fake-score-guidance-scale 0"),
    ({"context_noise": 1000.0}, "--context-noise 1000.0: must be from 0 to 999"),
    ({"local_attn_size": 5, "sink_size": 3}, "--local-attn-size 5: sink and block need 6"),
    ({"num_training_frames": 13}, "13 frames are not a multiple of 3"),
    ({"num_frame_per_block": 24, "local_attn_size": -1}, "12 frames are not"),
    ({"num_frame_per_block": 12, "local_attn_size": -1}, "a clip is one block, so use 12"),
    ({"independent_first_frame": True}, r"24 frames are not 1 \+ .* --num-training-frames"),
    ({"min_score_timestep": 800, "ts_schedule_max": True}, "between 800 and 750"),
    ({"min_timestep_ratio": 0.9, "max_timestep_ratio": 0.1}, "< --max-timestep-ratio"),
    *(({"denoising_steps": text}, "falling") for text in ("", "0", "500,750", "9,9", "1001,3")),
]


@pytest.mark.parametrize(("bad", "words"), IMPOSSIBLE)
def test_impossible_options_are_refused_in_one_sentence(bad, words):
    with pytest.raises(edm.UserError, match=words):
        cfg(**bad)


# ---------------------------------------------------------------- data and drift


def test_shapes_of_the_template_bank_bounce_with_constant_brightness():
    """Residual 0 and brightness in [0.6, 2], constant in a video, uniform over them.

    Velocity is 1 to 3 quarters of a pixel along each axis; the centre stays in [2, 6].
    """
    x, labels = videos(400, 36)
    a, residual = fit_shapes(x, labels, cv.templates())
    assert residual.max() < 1e-6
    assert fit_shapes(x, 1 - labels, cv.templates())[1].mean() > 1e-4  # a disc is no square
    assert (a - a[:, :1]).abs().max() < 1e-4
    found = [a.min().item(), a.max().item(), a.std(0).mean().item()]
    assert_close(found, [0.6, 2.0, 1.4 / math.sqrt(12)], rtol=0, atol=0.04)
    y, mass = torch.arange(8) + 0.5, (x + 1)[:, 0]
    centre = torch.stack([mass.sum(3) @ y, mass.sum(2) @ y], -1) / mass.sum((2, 3))[..., None]
    assert_close([centre.min().item(), centre.max().item()], [2.0, 6.0], rtol=0, atol=0.1)
    moved = centre.diff(dim=1).abs()
    assert moved.max() < 0.85  # a little more where the shape's edge is cut
    assert moved.median() > 0.2


def test_drift_measures_what_was_done_to_the_data():
    """Brightness a (1 + k/2) in block k: bias, spread and correlation in closed form."""
    x, labels = videos(300, 12)
    blocks, templates, k = [3] * 4, cv.templates(), torch.arange(4)
    factor = (1 + k / 2).repeat_interleave(3)[:, None, None]
    row = drift((x + 1) * factor - 1, labels, blocks, templates)
    a = fit_shapes(x, labels, templates)[0][:, 0]
    for name, wanted in [("bias", a.mean() * k / 2), ("spread", a.std() * (1 + k / 2))]:
        assert_close(row[name], wanted.tolist(), rtol=1e-3, atol=1e-4)
    assert_close(row["correlation"], [1.0] * 4, rtol=1e-3, atol=0)
    assert max(row["residual"]) < 1e-5
    x[:, :, 4] += 0.3 * torch.randn(300, 1, 8, 8)
    x[:, :, 9:] = x[:, :, 9:].roll(2, 0)  # brightness of another video of that label
    row = drift(x, labels, blocks, templates)
    assert_close(row["residual"][1], 0.09 / 3, rtol=0.15, atol=0)
    assert abs(row["correlation"][3]) < 0.3


# ---------------------------------------------------------------- training


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every update."""
    found = []
    Calls(monkeypatch, cv.Run, "update", lambda c: found.append(c.optimizer.param_groups[0]["lr"]))
    return found


def test_regression_returns_the_average_of_a_copy(tmp_path, monkeypatch, rates):
    """Learning rate of step k of K: lr min(1, k/200) ½ (1 + cos(π k/K))."""
    averages, start = Calls(monkeypatch, edm, "ema_update"), Shown(torch.zeros(1, 1, 2, 2, 2))
    settings = cfg(out=str(tmp_path))
    args = settings, edm.Run(settings, "causal_video"), start, 4, 0.1, 0.3
    result = cv.regress(*args, lambda network: (network.x - 1).square().mean())
    assert_close(rates, [0.1 * k / 200 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(1, 5)])
    wanted = [(result, 0.3, k) for k in range(1, 5)]
    assert [(c.ema, c.decay, c.step) for c in averages] == wanted
    assert averages[0].network.x.min() > result.x.max() > 0 == start.x.abs().max()


def test_training_starts_at_initialisation_and_teacher(tmp_path, monkeypatch, rates):
    """All three networks learn, at rates that fall to 0; the average is returned and drawn."""
    averages, drawn = Calls(monkeypatch, edm, "ema_update"), Calls(monkeypatch, cv, "pictures")
    before = []

    def look(call):
        before.extend(map(flat, (call.generator, call.fake, call.discriminator)))

    steps = Calls(monkeypatch, cv, "generator_step", look)
    settings = cfg(out=str(tmp_path), steps=3, generator_update_interval=1, objective="gan")
    settings.gradient_checkpointing = True
    teacher, start = network(1).requires_grad_(False), network(2)
    ema = cv.train(settings, edm.Run(settings, "causal_video"), "causvid", teacher, start)
    assert torch.equal(before[0], flat(start))
    assert torch.equal(before[1], flat(teacher))
    assert same(start, network(2))
    assert same(teacher, network(1))
    generator, fake, _ = learners = [steps[0].generator, steps[0].fake, steps[0].discriminator]
    assert not any(map(torch.equal, before[:3], map(flat, learners)))
    assert generator.checkpointing
    wanted = [(ema, generator, 0.99, k) for k in (1, 2, 3)]
    assert [(c.ema, c.network, c.decay, c.step) for c in averages] == wanted
    assert_close(rates, [3e-4 * 0.75, 5e-4 * 0.75, 3e-4 * 0.25, 5e-4 * 0.25, 0.0, 0.0])
    (call,) = drawn
    assert (call.step, call.generator, call.teacher, call.fake) == (3, ema, teacher, fake)


@pytest.mark.parametrize(("interval", "latents"), [(1, False), (3, False), (3, True)])
def test_interval_counts_fake_updates(tmp_path, net, monkeypatch, interval, latents):
    """The first has the generator's own x, the others new videos of the current generator.

    Not of the average; each with its own score window and labels. Of a larger backbone, which has
    latents, the real videos are the ends of its paths with their labels.
    """
    made = Calls(monkeypatch, cv, "student_video")
    used = Calls(monkeypatch, cv, "fake_step")
    options = {"ts_schedule": True, "last_step_only": False, "pairs": 2, "steps": 3}
    settings = cfg(out=str(tmp_path), generator_update_interval=interval, **options)
    pairs = {"path": torch.randn(2, 5, 1, 12, 8, 8), "labels": torch.tensor([0, 1])}
    net.requires_grad_(False).latents, run = latents, edm.Run(settings, "causal_video")
    ema = cv.train(settings, run, "self_forcing", net, net, pairs)
    assert len(used) == 3 * interval
    for video, fake in zip(made, used, strict=True):
        assert torch.equal(fake.x, video.result[0])
        assert (fake.real is video.real, fake.labels is video.labels) == (True, True)
        assert (fake.limits, fake.x.requires_grad) == (video.result[1], False)
        assert torch.equal(video.real, pairs["path"][video.labels, -1]) == latents
    assert len({fake.x.sum().item() for fake in used}) == 3 * interval
    assert latents or len({fake.real.sum().item() for fake in used}) == 3 * interval
    assert {video.generator for video in made} == {made[0].generator} != {ema}
    assert not latents or {y for video in made for y in video.labels.tolist()} == {0, 1}


# ---------------------------------------------------------------- the whole script


def tiny_run(folder, name="run", **changes):
    options = {"out": str(folder / name), "steps": 2, "batch": 2, "teacher_steps": 4}
    options |= {"pairs": 4, "ode_updates": 2, "eval_n": 10, "generator_update_interval": 2}
    return cv.main(cfg(**options | {"teacher": str(folder / "t.safetensors")} | changes))


@pytest.fixture
def saved(tmp_path, net):
    net.save(tmp_path / "t")
    return tmp_path


def stored(saved, stage, name="run"):
    return cv.load_video_denoiser(saved / name / stage / "generator.safetensors")


RUNS = [{}, {"objective": "sid", "mode": "causvid"}, {"objective": "gan", "mode": "self_forcing"}]
RUNS += [{"independent_first_frame": True, "num_training_frames": 10, "mode": "self_forcing"}]
RUNS += [{"num_frame_per_block": 3, "num_training_frames": 3, "mode": "causvid"}]


@pytest.mark.parametrize("options", RUNS)
def test_a_tiny_run_from_end_to_end(saved, options, monkeypatch):
    """All stages; the verdict has the promised lists. A finished run is only measured again."""
    result, settings = tiny_run(saved, **options), cfg(**options)
    assert json.loads((saved / "run/result.json").read_text()) == json.loads(json.dumps(result))
    stages = ["ode_init", *(m for m in ("causvid", "self_forcing") if settings.mode in (m, "both"))]
    assert list(result["metrics"]) == ["data", "teacher", *stages]
    clip, frames = cv.clip_blocks(settings, 12), cv.long_frames(settings, network())
    blocks = cv.block_layout(frames, 3, settings.independent_first_frame)
    for name, row in result["metrics"].items():
        for key in ("residual", "bias", "spread", "correlation"):
            assert len(row[key]) == len(clip if name == "teacher" else blocks)
            assert all(math.isfinite(v) for v in row[key])
        assert row["frames_per_second"] > 0
    files = ["curves.png", "generator.safetensors", "samples_2.png", "denoised.png"]
    files = [f"{stage}/{name}" for stage in stages for name in (*files, "checkpoint.pt")]
    for name in ("samples.png", "samples.gif", "drift.png", "pairs.safetensors", *files):
        assert (saved / "run" / name).stat().st_size > 0
    if not options:
        monkeypatch.setattr(cv.Run, "update", None)
        assert tiny_run(saved, resume=True, eval_n=20)["metrics"]["causvid"]["n"] == 20


def test_both_methods_start_from_the_ode_initialisation(saved, monkeypatch):
    """Not from each other; what each returns is in its file and goes to the verdict."""
    trainings, verdicts = (Calls(monkeypatch, cv, name) for name in ("train", "evaluate"))
    tiny_run(saved, eval_n=0)
    assert [call.mode for call in trainings] == ["causvid", "self_forcing"]
    students = verdicts[0].students
    for call in trainings:
        assert call.start is students["ode_init"]
        assert call.result is students[call.mode]
        assert same(call.result, stored(saved, call.mode))
        assert not same(call.result, call.start)
        assert same(call.start, stored(saved, "ode_init"))
        assert call.teacher is verdicts[0].teacher


KILLED = [{"teacher": "new", "mode": "causvid"}, {"objective": "gan", "mode": "self_forcing"}]


@pytest.mark.parametrize("options", KILLED)
def test_killed_runs_end_with_the_same_weights(saved, options, monkeypatch):
    """Stopped at every fifth update, resumed each time: bit-identical to one go, all stages.

    So is a run with more pictures: they leave its random numbers alone.
    """
    options |= {"eval_n": 0, "teacher_updates": 3, "ode_updates": 3, "steps": 3}
    options |= {"last_step_only": False, "context_noise": 100.0, "num_training_frames": 6}
    tiny_run(saved, "whole", **options)
    tiny_run(saved, "drawn", save_every=1, **options)
    done, result = itertools.count(1), None

    def die(call):
        if next(done) % 5 == 0:
            raise InterruptedError

    Calls(monkeypatch, cv.Run, "update", die)
    while result is None:
        with contextlib.suppress(InterruptedError):
            result = tiny_run(saved, "parts", save_every=1, resume=True, **options)
    assert result["resumed_from"] > 0
    for stage in ("ode_init", options["mode"], *(["teacher"] * ("teacher" in options))):
        whole, *others = (stored(saved, stage, name) for name in ("whole", "drawn", "parts"))
        assert all(same(whole, other) for other in others)


def test_each_row_of_the_verdict_is_of_its_own_sampler(tmp_path, monkeypatch):
    """Long roll-outs of each student, a clip of the teacher, the data; labels 0, 1, 0, 1 ...

    With one denoising step there is no noise between steps: a roll-out is the same each time.
    """
    kept = {}
    monkeypatch.setattr(plot, "save_strips", lambda path, videos: kept.update(videos))
    monkeypatch.setattr(plot, "curves", lambda folder: None)
    settings = cfg(out=str(tmp_path), eval_n=10, denoising_steps="1000", seed=3)
    teacher, students = network(1), {"one": Spy(network(2)), "two": network(3)}
    rows = cv.evaluate(settings, edm.Run(settings, "causal_video"), teacher, students)
    z, labels = cv.video_noise(teacher, 10, 36, 20003), torch.arange(10) % 2
    wanted = {name: cv.generate(n, z, labels, settings) for name, n in students.items()}
    wanted["teacher"] = cv.teacher_sampler(settings, teacher)(z[:, :, :12], labels)[:, -1]
    for name, x in (wanted | {"data": kept["data"]}).items():
        assert_close(kept[name], x)
        row = drift(x, labels, [3] * (x.shape[2] // 3), cv.templates())
        assert_close({key: rows[name][key] for key in row}, row)
    assert kept["data"].shape == z.shape
    assert max(rows["data"]["residual"]) < 1e-6  # they are drawn with these labels
    assert max(len(c.how["past"]) for c in students["one"].calls) == 3  # the window


def test_generators_and_the_shipped_teacher_are_loaded_frozen_and_sampled(tmp_path):
    """--sample comes before --teacher: a row for each of --n videos of 36 frames."""
    network(7).save(tmp_path / "g")
    settings = cfg(sample=str(tmp_path / "g.safetensors"), teacher="?", out=str(tmp_path), n=2)
    generator, teacher = cv.load_teacher(settings), cv.load_teacher(cfg())
    assert same(generator, network(7))
    assert (teacher.shape, teacher.training) == ((1, cv.FRAMES, 8, 8), False)
    assert not any(p.requires_grad for p in (*generator.parameters(), *teacher.parameters()))
    x, labels = videos(64)
    error = (teacher(cv.diffuse(x, torch.ones(64)), 1.0, labels) - x).square().mean().item()
    assert_close(error, 0.0196, rtol=0, atol=0.0003)  # a number of the shipped weights
    assert cv.main(settings) == {}
    assert Image.open(tmp_path / "sampled.png").size == (36 * 10 + 2, 2 * 10 + 2)
    edm.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"network": {}})
    with pytest.raises(edm.UserError, match="holds no video denoiser"):
        cv.load_video_denoiser(tmp_path / "x.safetensors")

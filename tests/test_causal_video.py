"""CausVid and Self-Forcing: causality, cache, roll-out, who gets gradients, the options."""

import contextlib
import itertools
import json
import math

import pytest
import torch
from conftest import Calls, Gaussian, Spy, randomise
from PIL import Image
from torch.testing import assert_close

import causal_objectives as objectives
import causal_video as cv
import edm_teacher as edm
from tools import plot
from tools.drift import drift, fit_shapes


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


class Affine(edm.Denoiser):
    """D = a x_t + c_y with a label y, a x_t + u without: makes formulas of D_real and D_fake."""

    def __init__(self, a, c, u=0.0, size=8):
        super().__init__(torch.nn.Linear(1, 1), (1, 12, size, size), 2)
        self.a, self.c, self.u = a, torch.tensor(c), u

    def forward(self, x, sigma, labels=None):
        return self.a * x + (self.u if labels is None else edm.expand(self.c[labels], x))


def reached(loss, *modules):
    weights = [next(module.parameters()) for module in modules]
    return [g is not None for g in torch.autograd.grad(loss, weights, allow_unused=True)]


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def same(a, b):
    return torch.equal(flat(a), flat(b))


# --- preconditioning and noise ---
@pytest.mark.parametrize("frames", [1, 4])
def test_denoiser_of_the_exact_velocity_returns_the_clean_video(frames):
    """D = x_t/(1+σ) - σ/(1+σ) F, F = ε - x of (1-t) x + t ε, t = σ/(1+σ) by sample or frame, is x.
    flow_loss is the error of F: ((1+σ)/σ)² (D - x)² = (F - (ε - x))²."""

    class Known(cv.VideoDenoiser):
        def velocity(self, x_t, t, labels):
            assert_close(t, (sigma / (1 + sigma)).expand(3, 4))
            t = t[:, None, :, None, None]
            assert_close(x_t, (1 - t) * x + t * eps)
            return eps - x + error, None, None

    torch.manual_seed(0)
    x, eps, wrong = torch.randn(3, 3, 1, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([[0.1], [3.0], [9999.0]], dtype=torch.float64).repeat(1, frames).cumsum(1)
    args, error = (x + sigma.reshape(3, 1, -1, 1, 1) * eps, sigma.squeeze(1)), 0.0
    assert_close(Known()(*args), x, rtol=0, atol=1e-9)
    error = wrong
    assert_close(cv.flow_loss(Known()(*args), x, args[1]), wrong.square().mean())


def test_network_knows_its_label_and_the_distance_of_frames_not_their_number(net):
    """No label is -1. q · k after rotation is a function of the difference of frame numbers."""
    x, labels = videos()
    out, none, other = (net(x, 0.7, y) for y in (labels, None, 1 - labels))
    assert torch.equal(net(x, 0.7, torch.tensor([-1, -1])), none)
    assert_close(net(x, 0.7, labels, start=9), out, rtol=0, atol=1e-5)
    backwards = net(x.flip(2), 0.7, labels).flip(2)
    for a, b in ((out[0], none[0]), (out[1], none[1]), (out, other), (out, backwards)):
        assert (a - b).abs().max() > 1e-3


# --- mask and cache ---
SEEN = [(False, -1, 0, range(12)), (False, 6, 0, [9, 10, 11]), (False, 6, 3, [0, 1, 2])]
SEEN += [(True, -1, 0, range(13)), (True, 9, 3, [0, 1, 2, 10, 11, 12]), (True, 3, 0, [])]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("first", "window", "sink", "last_sees"), SEEN)
def test_mask_and_cache_are_the_same(net, first, window, sink, last_sees, training):
    """A block of a roll-out from cached keys and values = one call under the block-causal mask, its
    past the roll-out's at σ = 0. The oldest frames leave the window, the first `sink` stay."""
    frames, labels = 15 + first, torch.tensor([0, 1])
    blocks, z = cv.block_layout(frames, 3, first), torch.randn(2, 1, frames, 8, 8)
    mask = cv.block_mask(blocks, window, sink, hide_first=training)
    last_sees = [f for f in last_sees if not training or f >= blocks[0]]
    assert mask[-1].nonzero().flatten().tolist() == [*last_sees, *range(frames - 3, frames)]
    settings = cfg(denoising_steps="1000", local_attn_size=window, sink_size=sink)
    settings.independent_first_frame, settings.hide_first_block = first, True
    with torch.no_grad():
        x = cv.rollout(net, z, labels, settings, training=training)
    for start, end in itertools.pairwise([0, *itertools.accumulate(blocks)]):
        x_t = torch.cat([x[:, :, :start], 9999 * z[:, :, start:end]], 2)
        args = x_t, torch.arange(end).ge(start).expand(2, -1) * 9999.0, labels
        assert_close(net(*args, mask=mask[:end, :end]), x[:, :, :end], rtol=0, atol=1e-5)
    assert (net(*args) - x)[:, :, start:].abs().max() > 1e-3  # the mask does something


def test_changing_a_future_frame_leaves_the_past_bit_identical(net):
    """M_ij = 1 iff ⌊j/k⌋ <= ⌊i/k⌋ (CausVid Eq. 5); inside a block all frames see each other."""
    (x, labels), mask, i = videos(), cv.block_mask([3] * 4), torch.arange(12) // 3
    assert torch.equal(mask, i[None, :] <= i[:, None])
    changed = x + (torch.arange(12) == 6)[:, None, None]  # the first frame of the third block
    before, after = (net(v, 1.0, labels, mask=mask) for v in (x, changed))
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert (before - after)[:, :, 8].abs().max() > 1e-4


# --- the roll-out ---
@pytest.mark.parametrize(("level", "training"), [(0.0, False), (1.0, False), (1.0, True)])
def test_roll_out_continues_its_own_outputs_with_fresh_noise_between_steps(net, level, training):
    """x_(k+1) = x̂ + σ_(k+1) ε, new unit noise. Context noise, 500 is σ = 1, is a label; in sampling
    the network, whose c_in is then 1/2, gets clean frames, as in Self-Forcing."""
    spy, z, settings = Spy(net), torch.randn(64, 1, 6, 8, 8), cfg(context_noise=500 * level)
    x = cv.rollout(spy, z, torch.arange(64) % 2, settings, [1, 2], training)
    calls, sigmas = spy.calls, [9999.0, 15.0, level, 9999.0, 15.0, 5.0, level]
    assert_close([c.sigma.item() for c in calls], sigmas, rtol=1e-5, atol=0)
    assert_close(torch.cat([calls[0].x, calls[3].x], 2), 9999 * z, rtol=1e-5, atol=0)
    out = [net(c.x, c.sigma, c.labels, start=c.how["start"], past=c.how["past"]) for c in calls]
    assert torch.equal(x, torch.cat([out[1], out[5]], 2))
    for k in (2, 6):
        noise = calls[k].x - out[k - 1] * (1 if training else 1 + level)
        assert_close(noise.std().item(), level * training, rtol=0.03, atol=1e-6)
    eps = [(calls[k].x - out[k - 1]) / calls[k].sigma for k in (1, 4, 5)]
    eps = torch.stack([v.flatten() for v in (z[:, :, :3], z[:, :, 3:], *eps)])
    assert_close(eps.std(1), torch.ones(5), rtol=0.03, atol=0)
    assert (torch.corrcoef(eps) - torch.eye(5)).abs().max() < 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_a_roll_out_is_that_of_its_exit_calls(net, checkpointing, monkeypatch):
    """∂/∂θ of the video = sum over blocks of ∂/∂θ of one call, its input and cache constant. Frames
    before the last 12 get none. Checkpointing computes the two layers of each such call again."""
    used, recompute, weights = [], cv.recompute, list(net.parameters())
    monkeypatch.setattr(cv, "recompute", lambda *a, **how: used.append(a) or recompute(*a, **how))
    spy, net.checkpointing = Spy(net), checkpointing
    args = torch.randn(2, 1, 15, 8, 8), torch.tensor([0, 1]), cfg(), [1, 2, 0, 1, 0]
    video = cv.rollout(spy, *args, training=True)
    found = torch.autograd.grad(video.pow(3).sum(), weights)
    assert [c.grad for c in spy.calls] == [0, 0, 0, *(0, 0, 1, 0), *(1, 0), *(0, 1, 0), *(1, 0)]
    assert len(used) == 8 * checkpointing
    net.checkpointing, loss = False, 0
    for call in [call for call in spy.calls if call.grad]:
        cached = [v for layers in call.how["past"].values() for kv in layers for v in kv]
        assert not any(v.requires_grad for v in (call.x, *cached))
        loss = loss + net(call.x, call.sigma, call.labels, **call.how).pow(3).sum()
    assert_close(found, torch.autograd.grad(loss, weights), rtol=1e-4, atol=1e-4)


# --- the two methods ---
def test_causvid_trains_on_noised_real_videos_under_the_mask(net):
    """Each block of each sample has one of the steps' σ or 0, of its own (CausVid Alg. 1)."""
    spy, (real, labels) = Spy(net), videos(400)
    settings = cfg(local_attn_size=9, sink_size=3, hide_first_block=True)
    x, *others = cv.student_video("causvid", spy, real, labels, settings)
    (call,) = spy.calls
    assert torch.equal(x, net(call.x, call.sigma, labels, **call.how))
    assert others == [(0, 1000), 0]  # score window, first frame of the loss
    by_block = call.sigma.unflatten(1, (4, 3))
    assert torch.equal(by_block, by_block[..., :1].expand_as(by_block))
    share = (by_block[..., :1] == cv.student_sigmas(settings)).float().mean((0, 1))
    assert_close(share, torch.full((5,), 0.2), rtol=0, atol=0.05)
    assert_close(share.sum().item(), 1.0)
    assert torch.equal(call.how["mask"], cv.block_mask([3] * 4, 9, 3, hide_first=True))
    assert call.how["mask"][::3, 0].tolist() == [
        True,
        True,
        True,
        False,
    ]  # the last is kept from it
    assert_close((call.x - real).flatten(3).std(-1)[:, 0], call.sigma, rtol=0.5, atol=1e-6)


@pytest.mark.parametrize(("first", "clip", "longest"), [(False, 12, 24), (True, 10, 22)])
def test_self_forcing_trains_on_the_end_of_its_own_roll_out(net, monkeypatch, first, clip, longest):
    """12 to 24 frames from unit noise, each block left at one random step or its own. Scores see
    the last 12, less the first block if there were more. The real video is never looked at."""
    rollouts = Calls(monkeypatch, cv, "rollout")
    settings = cfg(last_step_only=False, ts_schedule=True, ts_schedule_max=True)
    settings.independent_first_frame, settings.num_training_frames = first, longest
    settings.same_step_across_blocks = first
    args = torch.full((2, 1, clip, 8, 8), torch.nan), torch.tensor([0, 1]), settings
    for _ in range(20):
        with torch.no_grad():
            x, window, skipped = cv.student_video("self_forcing", net, *args)
        call = rollouts[-1]
        assert torch.equal(x, call.result[:, :, -clip:])  # which NaN would not be
        assert (call.training, window) == (True, cv.score_window(call.exits, settings))
        assert skipped == (call.z.shape[2] > clip) * (1 if first else 3)
    assert {call.z.shape[2] for call in rollouts} == {*range(clip, longest + 1, 3)}
    assert all({call.exits[b] for call in rollouts} == {0, 1, 2, 3} for b in range(4))
    assert all(len({*call.exits}) == 1 for call in rollouts) == first
    assert cv.exit_steps(7, 4, cfg()) == [3] * 7  # --last-step-only
    z = torch.cat([call.z.flatten() for call in rollouts])
    assert_close([z.mean().item(), z.std().item()], [0.0, 1.0], rtol=0, atol=0.02)


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("mode", ["causvid", "self_forcing"])
def test_each_step_reaches_its_network_alone_and_every_call_has_the_labels(net, mode, objective):
    """Step A: the generator. Step B: the fake, and for a GAN the discriminator."""
    spies = generator, teacher, fake = Spy(net), Spy(network(1)), Spy(network(2))
    settings, real, head = cfg(objective=objective), videos(4), objectives.Discriminator(net)
    loss, made, _ = cv.generator_step(generator, teacher, fake, head, settings, mode, *real)
    second, _ = cv.fake_step(fake, head, settings, *made, *real)
    assert reached(loss, *spies, head) == [True, False, False, False]
    assert reached(second, *spies, head) == [False, False, True, objective == "gan"]
    assert all(torch.equal(call.labels, real[1]) for spy in spies for call in spy.calls)


def step_on(monkeypatch, x, data, *networks, **options):
    """generator_step on x, scores in [250, 500), first frame 3 -> numel dL/dx from there, log"""
    x = x.clone().requires_grad_()
    monkeypatch.setattr(cv, "student_video", lambda *args: (x * 1, (250, 500), 3))
    loss, _, log = cv.generator_step(None, *networks, cfg(**options), None, *data)
    (grad,) = torch.autograd.grad(loss, x)
    assert not grad[:, :, :3].any()
    return grad[:, :, 3:] * x[:, :, 3:].numel(), log


def step_with_known_scores(objective, monkeypatch, w_real, w_fake):
    """r = 0.7 x_t + ..., f = 0.4 x_t + ..., each c + w (c - u) -> x, r, f, numel dL/dx, log"""
    x, labels = videos(8)
    x = torch.cat([x, x.flip(3)], 1)  # two channels
    spies = Spy(Affine(0.7, (0.3, -0.2), -0.4)), Spy(Affine(0.4, (-0.1, 0.5), 0.8))
    how = {"real_score_guidance_scale": w_real, "fake_score_guidance_scale": w_fake}
    found = step_on(monkeypatch, x, (None, labels), *spies, None, objective=objective, **how)
    call, scores = spies[0].calls[0], []
    assert call.sigma.shape == (8,)  # one for all frames of a video
    assert 1.66 < call.sigma.min() < call.sigma.max() < 5  # what shift 5 makes of [250, 500)
    for spy, w in zip(spies, (w_real, w_fake), strict=True):
        assert [c.labels is None for c in spy.calls] == [False, True][: 1 + (w > 0)]  # c, u
        assert all(torch.equal(c.x, call.x) and torch.equal(c.sigma, call.sigma) for c in spy.calls)
        c, u = edm.expand(spy.model.c[labels], x), spy.model.u
        scores.append((spy.model.a * call.x + c + w * (c - u)).detach())
    return x, *scores, *found


@pytest.mark.parametrize("w", [(0.0, 0.0), (3.0, 0.5)])
def test_dmd_gradient_on_the_video_is_the_weighted_difference_of_scores(monkeypatch, w):
    """numel dL/dx = (f - r) / mean|x - r|, r = D_real, f = D_fake at one x_t  (DMD Eq. 7, 8)."""
    x, r, f, found, log = step_with_known_scores("dmd", monkeypatch, *w)
    grad = (f - r) / (x - r).abs().mean((1, 2, 3, 4), keepdim=True)
    assert_close(found, grad[:, :, 3:], rtol=1e-4, atol=1e-5)
    wanted = {"|D_fake - D_real|": (f - r).abs().mean(), "|grad|": grad.square().mean().sqrt()}
    assert_close(log, wanted)


@pytest.mark.parametrize("w", [0.0, 3.0])
def test_sid_loss_and_its_gradient_through_both_scores(monkeypatch, w):
    """L = mean v (r-f)((r-x) - α (r-f)), v = 1/mean|x-r| constant; for α = 1, slopes a, b of r, f,
    numel dL/dx = v ((a-b)(f-x) + (r-f)(b-1)). As in Self-Forcing's code f has no guidance."""
    x, r, f, found, log = step_with_known_scores("sid", monkeypatch, w, 0.0)
    v = 1 / (x - r).abs().mean((1, 2, 3, 4), keepdim=True)
    assert_close(found, (v * (0.3 * (f - x) - 0.6 * (r - f)))[:, :, 3:], rtol=1e-3, atol=1e-5)
    assert_close(log["SiD loss"], (v * (r - f) * (f - x)).mean())
    wanted = (v * (r - f) * ((r - x) - 1.2 * (r - f))).mean()
    assert_close(objectives.sid_loss(x, r, f, alpha=1.2), wanted)


def test_fake_learns_flow_matching_on_generated_videos():
    """mean ((1+σ)/σ)² (D(x + σ ε) - x)², x generated: the real video plays no part."""
    torch.manual_seed(0)
    x, fake, labels = torch.randn(64, 1, 12, 2, 2), Spy(Affine(0.6, (0.3, -0.2))), torch.arange(64)
    loss, log = cv.fake_step(fake, None, cfg(), x, (250, 500), x + 7, labels % 2)
    (call,) = fake.calls
    assert 1.66 < call.sigma.min() < call.sigma.max() < 5  # as above
    eps = (call.x - x) / edm.expand(call.sigma, x)
    assert_close(eps.std(), torch.tensor(1.0), rtol=0, atol=0.05)
    error = (fake.model(call.x, 0, call.labels) - x).square().mean((1, 2, 3, 4))
    assert_close(loss, ((1 + 1 / call.sigma) ** 2 * error).mean())
    assert log == {"fake loss": loss}


# --- the GAN ---
def test_gan_pushes_the_video_up_and_the_discriminator_the_other_way(net, monkeypatch):
    """Better is the generator's own, for the discriminator the real one; all at one σ. Logits l are
    means of x_t here: numel dL/dx = -sigmoid(l_real - l_own). R1 and R2 are squared slopes."""
    monkeypatch.setattr(objectives, "GAN_PENALTY", 1e3)
    seen, (real, labels), std = [], videos(4), objectives.GAN_STD

    def head(backbone, x_t, sigma, y):
        seen.append((x_t.detach(), sigma, x_t.flatten(1).mean(1)))
        return seen[-1][-1]

    made = 100 * torch.tensor([1.0, -1.0]).repeat(4, 1, 12, 8, 4)  # unlike the real one
    found, log = step_on(monkeypatch, made, (real, labels), None, net, head, objective="gan")
    own, of_real = (logits.detach() for *_, logits in seen)
    slope = edm.expand(-torch.sigmoid(of_real - own), found).expand_as(found)
    assert_close(found, slope, rtol=1e-2, atol=1e-7)
    assert_close(log["GAN loss"], -torch.sigmoid(own - of_real).log().mean())
    loss, log = cv.fake_step(net, head, cfg(objective="gan"), made, (250, 500), real, labels)
    for (x_t, sigma, _), v in zip(seen, (made, real, real, made, real, made), strict=True):
        assert 1.66 < sigma.min() < sigma.max() < 5
        assert_close((x_t - v).std((1, 2, 3, 4)), sigma, rtol=0.1, atol=0)
    x_t, sigmas, logits = zip(*seen[2:], strict=True)
    assert all(torch.equal(sigma, sigmas[0]) for sigma in sigmas)
    assert torch.equal(seen[0][1], seen[1][1])
    for clean, close, name in ((0, 2, "R1"), (1, 3, "R2")):
        assert_close((x_t[close] - x_t[clean]).std().item(), std, rtol=0.1, atol=0)
        assert_close(log[name], ((logits[close] - logits[clean]) / std).square().mean())
    penalty = 1e3 * (log["R1"] + log["R2"]) / 2
    assert_close(loss, -torch.sigmoid(logits[0] - logits[1]).log().mean() + penalty)


def test_discriminator_judges_each_video_alone_with_a_query_for_each_layer(net):
    (x, labels), head = videos(4), randomise(objectives.Discriminator(net))
    args = x, torch.tensor([0.1, 1.0, 5.0, 0.5]), labels
    together, alone = head(net, *args), [head(net, *(v[i : i + 1] for v in args)) for i in range(4)]
    assert_close(together, torch.cat(alone))
    assert together.std() > 1e-3
    (grad,) = torch.autograd.grad(together.sum(), head.query)
    assert grad.abs().amax((1, 2, 3)).min() > 1e-6


# --- ODE initialisation ---
def test_ode_path_follows_the_exact_flow_through_the_students_levels():
    """N(m, s²): x(σ) = m + (x_0 - m) √((s² + σ²)/(s² + σ_max²)), exact for s = 0. Euler's error
    falls with its step. Steps are even in u = σ/(5+σ), before a shift of 5."""
    z, sigmas, errors = torch.randn(50, 1, 1, 2, 2), cv.student_sigmas(cfg()), []
    for std, substeps in [(0.0, 1), (0.5, 4), (0.5, 16), (0.5, 64)]:
        teacher = Gaussian(0.3, std)
        path = cv.ode_path(teacher, z, None, sigmas, substeps, 1.0)
        ratio = ((std**2 + sigmas**2) / (std**2 + 9999**2)).sqrt()
        exact = 0.3 + ratio[:, None, None, None, None] * (9999 * z[:, None] - 0.3)
        errors.append((path - exact)[:, 1:].abs().max().item())
        u, called = (sigmas / (5 + sigmas)).tolist(), torch.stack(teacher.calls)[:, 0]
        wanted = [torch.linspace(*ab, substeps + 1)[:-1] for ab in itertools.pairwise(u)]
        assert_close(called / (5 + called), torch.cat(wanted), rtol=1e-4, atol=1e-6)
    assert errors[0] < 1e-3
    assert errors[3] < 0.4 * errors[2] < 0.16 * errors[1]


def test_ode_paths_end_where_guidance_and_their_own_label_lead():
    """Points c_y as data: a path ends in c + w (c - u) of its label, in each batch of 256. 16 Euler
    steps are 4 in each of 4 intervals. z is of its own, not the verdict's."""
    teacher = Spy(Affine(0.0, (0.25, -0.5), 0.125, size=2))
    path, labels = cv.make_paths(cfg(pairs=300, real_score_guidance_scale=3.0), teacher).values()
    assert torch.equal(labels, torch.arange(300) % 2)
    ends = torch.tensor([0.25 + 3 * 0.125, -0.5 - 3 * 0.625])[labels]
    assert_close(path[:, -1], edm.expand(ends, path[:, -1]).expand(300, 1, 12, 2, 2))
    assert len(teacher.calls) == 2 * 16 * 2  # batches, steps, with and without label
    both = torch.stack([path[:, 0] / 9999, cv.video_noise(teacher, 300, 12, 20000)]).flatten(2)
    assert_close(both.std((1, 2)), torch.ones(2), rtol=0, atol=0.02)
    assert len(both[..., 0].unique()) == 600


def test_ode_initialisation_regresses_each_block_from_its_own_level(net, monkeypatch):
    """Inputs are states of a path at the block's σ; clean frames do not count (CausVid Eq. 6).
    The student starts from the teacher, and its own videos are drawn."""
    spy, begun, drawn, teacher = Spy(net), [], [], network(1)
    monkeypatch.setattr(cv, "regress", lambda *args: begun.append(args) or spy)
    monkeypatch.setattr(cv, "pictures", lambda *args: drawn.append(args[2:5]))
    pairs = {"path": torch.randn(2, 5, 1, 12, 8, 8), "labels": torch.tensor([0, 1])}
    assert cv.train_ode(cfg(pairs=2, batch=32), None, teacher, pairs) is spy
    ((_, _, start, *_, loss_of),) = begun
    assert (start, drawn) == (teacher, [(spy, teacher, teacher)])
    loss, (call,) = loss_of(spy), spy.calls
    assert {*call.labels.tolist()} == {0, 1}
    assert torch.equal(call.how["mask"], cv.block_mask([3] * 4, 6))
    path = pairs["path"][call.labels, :, 0]
    for k, level in enumerate(cv.student_sigmas(cfg())):
        there = call.sigma == level
        assert there.float().mean() > 0.1
        assert torch.equal(call.x[:, 0][there], path[:, k][there])
    out = net(call.x, call.sigma, call.labels, **call.how)[:, 0]
    assert_close(loss, (out - path[:, -1]).square()[call.sigma > 0].mean())


def test_teacher_is_trained_with_shift_5_and_a_tenth_without_label(monkeypatch):
    """σ = 5 u/(1-u), u uniform: median 5."""
    spy = Spy(Affine(0.6, (0.3, -0.2, 0.1)))
    monkeypatch.setattr(cv, "regress", lambda *args: args[-1](spy))
    cv.train_teacher(cfg(batch=1000), None)
    (call,) = spy.calls
    assert_close((call.labels == -1).float().mean(), torch.tensor(0.1), rtol=0, atol=0.03)
    assert_close(call.sigma.median(), torch.tensor(5.0), rtol=0.15, atol=0)


# --- the options' arithmetic ---
def test_time_shift_is_a_factor_on_sigma():
    """t' = 1000 k τ/(1 + (k-1) τ) is σ' = k σ; 1/k undoes it. CausVid's 757, 522 have k = 8.
    σ = τ/(1-τ), τ = t/1000 up to 0.9999, then 0; --warp-denoising-step: times the shift."""
    for text, warp, shift, wanted in [
        ("1000,750,500,250", True, 5.0, [9999, 5 * 3, 5 * 1, 5 / 3, 0]),
        ("1000,280,120,0", True, 8.0, [9999, 8 * 28 / 72, 8 * 12 / 88, 0]),
        ("1000,757,522", False, 8.0, [9999, 757 / 243, 522 / 478, 0]),
    ]:
        settings = cfg(denoising_steps=text, warp_denoising_step=warp, timestep_shift=shift)
        assert_close(cv.student_sigmas(settings), torch.tensor(wanted), rtol=1e-6, atol=0)
    assert [round(cv.shift_timestep(t, 8.0)) for t in (280, 120)] == [757, 522]
    assert_close(cv.shift_timestep(cv.shift_timestep(333.0, 7.0), 1 / 7), 333.0)


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


# --- data and drift ---
def test_shapes_of_the_template_bank_bounce_with_constant_brightness():
    """Brightness is uniform in [0.6, 2], velocity 1 to 3 quarters of a pixel along each axis."""
    x, labels = videos(400, 36)
    a, _ = fit_shapes(x, labels, cv.templates())
    assert fit_shapes(x, 1 - labels, cv.templates())[1].mean() > 1e-4  # a disc is no square
    assert (a - a[:, :1]).abs().max() < 1e-4
    found = [a.min().item(), a.max().item(), a.std(0).mean().item()]
    assert_close(found, [0.6, 2.0, 1.4 / math.sqrt(12)], rtol=0, atol=0.04)
    y, mass = torch.arange(8) + 0.5, (x + 1)[:, 0]
    centre = torch.stack([mass.sum(3) @ y, mass.sum(2) @ y]) / mass.sum((2, 3))
    assert_close([centre.min().item(), centre.max().item()], [2.0, 6.0], rtol=0, atol=0.1)
    moved = centre.diff().abs()
    assert moved.max() < 0.85  # a little more where the shape's edge is cut
    assert moved.median() > 0.2


def test_drift_measures_what_was_done_to_the_data():
    """Brightness a (1 + k/2) in block k; noise of variance 0.09 in a frame; others' last blocks."""
    (x, labels), bank, k = videos(300), cv.templates(), torch.arange(4)
    factor = (1 + k / 2).repeat_interleave(3)[:, None, None]
    row = drift((x + 1) * factor - 1, labels, [3] * 4, bank)
    a = fit_shapes(x, labels, bank)[0][:, 0]
    wanted = {"residual": 0.0 * k, "bias": a.mean() * k / 2, "spread": a.std() * (1 + k / 2)}
    wanted = {name: v.tolist() for name, v in wanted.items()} | {"correlation": [1.0] * 4}
    assert_close(row, wanted, rtol=1e-3, atol=1e-4)
    x[:, :, 4] += 0.3 * torch.randn(300, 1, 8, 8)
    x[:, :, 9:] = x[:, :, 9:].roll(2, 0)  # brightness of another video of that label
    row = drift(x, labels, [3] * 4, bank)
    assert_close(row["residual"][1], 0.09 / 3, rtol=0.15, atol=0)
    assert abs(row["correlation"][3]) < 0.3


# --- training ---
def test_regression_returns_the_average_of_a_copy(tmp_path, monkeypatch):
    """Learning rate of step k of K: lr min(1, k/200) ½ (1 + cos(π k/K)). It starts at the copy."""
    first, rates, start = [], [], torch.nn.Linear(2, 2)
    Calls(monkeypatch, edm.Run, "update", lambda c: rates.append(c.optimizer.param_groups[0]["lr"]))
    averages = Calls(monkeypatch, edm, "ema_update", lambda c: first.append(flat(c.ema)))
    settings, before = cfg(out=str(tmp_path)), flat(start)
    args = settings, edm.Run(settings, "causal_video"), start, 4, 0.1, 0.3
    result = cv.regress(*args, lambda network: (network.weight - 9).square().mean())
    assert_close(rates, [0.1 * k / 200 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(1, 5)])
    assert [(c.ema, c.decay, c.step) for c in averages] == [(result, 0.3, k) for k in range(1, 5)]
    assert (first[0].tolist(), flat(start).tolist()) == (before.tolist(), before.tolist())
    weights = torch.stack([start.weight, result.weight, averages[0].network.weight])
    assert weights.diff(dim=0).min() > 0


@pytest.mark.parametrize("latents", [False, True])
def test_training_starts_at_initialisation_and_teacher(tmp_path, monkeypatch, latents):
    """Then the updates alternate: the fake's first has the generator's own x, the others new videos
    of the current generator, not of the average, which starts from the generator, is returned and
    drawn. Of a backbone with latents, the real videos are the ends of its paths."""
    names, first, rates = ("generator_step", "student_video", "fake_step", "pictures"), [], []
    steps, made, used, drawn = (Calls(monkeypatch, cv, name) for name in names)
    averages = Calls(monkeypatch, edm, "ema_update", lambda c: first.append(flat(c.ema)))
    Calls(monkeypatch, edm.Run, "update", lambda c: rates.append(c.optimizer.param_groups[0]["lr"]))
    Calls(monkeypatch, edm.Run, "update", lambda c: first.append(flat(c.network)))
    settings = cfg(out=str(tmp_path), steps=3, pairs=2, objective="gan", last_step_only=False)
    settings.gradient_checkpointing, settings.ts_schedule = True, True
    settings.generator_update_interval, run = 2, edm.Run(settings, "causal_video")
    teacher, start = network(1).requires_grad_(False), network(2)
    teacher.latents, n = latents, len(flat(teacher))
    pairs = {"path": torch.randn(2, 5, 1, 12, 8, 8), "labels": torch.tensor([0, 1])}
    ema = cv.train(settings, run, "self_forcing", teacher, start, pairs)
    generator, fake, head = steps[0].generator, steps[0].fake, steps[0].discriminator
    for begun, end, weights in zip(first, (generator, ema, fake), (2, 2, 1), strict=False):
        assert torch.equal(begun[:n], flat(network(weights)))
        assert not torch.equal(begun[:n], flat(end))
    assert not torch.equal(first[2][n:], flat(head))
    assert all([same(start, network(2)), same(teacher, network(1)), generator.checkpointing])
    wanted = [(ema, generator, 0.99, k) for k in (1, 2, 3)]
    assert [(c.ema, c.network, c.decay, c.step) for c in averages] == wanted
    assert_close(rates, [lr * r for r in (0.75, 0.25, 0.0) for lr in (3e-4, 5e-4, 5e-4)])
    assert [(c.step, c.generator, c.teacher, c.fake) for c in drawn] == [(3, ema, teacher, fake)]
    assert len({call.real for call in used}) == 3 * 2
    for video, call in zip(made, used, strict=True):
        assert (video.mode, video.generator) == ("self_forcing", generator)
        assert torch.equal(call.x, video.result[0])
        assert (call.limits, call.x.requires_grad) == (video.result[1], False)
        assert (call.real is video.real, call.labels is video.labels) == (True, True)
        assert torch.equal(video.real, pairs["path"][video.labels, -1]) == latents
    assert {y for video in made for y in video.labels.tolist()} == {0, 1}


# --- the whole script ---
def tiny_run(folder, name="run", **changes):
    network().save(folder / "t")
    options = {"out": str(folder / name), "steps": 2, "batch": 2, "teacher_steps": 4}
    options |= {"pairs": 4, "ode_updates": 2, "eval_n": 10, "generator_update_interval": 2}
    return cv.main(cfg(**options | {"teacher": str(folder / "t.safetensors")} | changes))


RUNS = [("both", "dmd", 24, 12, 36), ("causvid", "sid", 3, 3, 9)]
RUNS += [("self_forcing", "gan", 22, 10, 28)]


@pytest.mark.parametrize(("mode", "objective", "longest", "clip", "frames"), RUNS)
def test_a_tiny_run_from_end_to_end(tmp_path, monkeypatch, mode, objective, longest, clip, frames):
    """Both methods start from the initialisation; results are in files and in the verdict: long
    roll-outs of each student, alike with one denoising step, and a clip of the teacher."""
    options = {"mode": mode, "objective": objective, "num_training_frames": longest, "batch": 8}
    options |= {"independent_first_frame": longest == 22, "denoising_steps": "1000", "seed": 3}
    functions = (cv, "train"), (cv, "evaluate"), (plot, "save_strips")
    trainings, verdicts, strips = (Calls(monkeypatch, *function) for function in functions)
    result = tiny_run(tmp_path, **options)
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    settings, teacher, students = verdicts[0].cfg, verdicts[0].teacher, verdicts[0].students
    modes = ["causvid", "self_forcing"] if mode == "both" else [mode]
    for name, call in zip(modes, trainings, strict=True):
        assert (call.mode, call.teacher, call.start) == (name, teacher, students["ode_init"])
        assert call.result is students[name] is not call.start
    z, labels = cv.video_noise(teacher, 10, frames, 20003), torch.arange(10) % 2
    made, rows = strips[0].videos, result["metrics"]
    wanted = {"data": made["data"]}
    wanted["teacher"] = cv.teacher_sampler(settings, teacher)(z[:, :, :clip], labels)[:, -1]
    wanted |= {name: cv.generate(students[name], z, labels, settings) for name in students}
    assert list(rows) == ["data", "teacher", "ode_init", *modes] == list(wanted)
    assert_close(made, wanted)
    assert made["data"].shape == z.shape
    assert max(rows["data"]["residual"]) < 1e-6  # they are drawn with these labels
    for name, x in made.items():
        row = drift(x, labels, cv.block_layout(x.shape[2], 3, longest == 22), cv.templates())
        assert_close({key: rows[name][key] for key in row}, row)
        assert rows[name]["frames_per_second"] > 0
    files = ["samples.png", "samples.gif", "drift.png", "pairs.safetensors"]
    for stage, student in students.items():
        files += [f"{stage}/{name}" for name in ("curves.png", "samples_2.png", "denoised.png")]
        path = tmp_path / "run" / stage / "generator.safetensors"
        assert same(student, cv.load_video_denoiser(path))
    assert all((tmp_path / "run" / name).stat().st_size > 0 for name in files)
    if mode == "both":  # a finished run is only measured again
        monkeypatch.setattr(cv.Run, "update", None)
        again = tiny_run(tmp_path, resume=True, eval_n=20, **options)
        assert again["metrics"]["causvid"]["n"] == 20


def test_killed_runs_end_with_the_same_weights(tmp_path, monkeypatch):
    """Stopped in each stage and resumed: bit-identical to one go, which draws fewer pictures."""
    options = {"teacher": "new", "teacher_updates": 3, "ode_updates": 3, "steps": 3, "eval_n": 0}
    options |= {"last_step_only": False, "context_noise": 100.0, "num_training_frames": 6}
    tiny_run(tmp_path, "whole", objective="gan", **options)
    done, result = itertools.count(1), None

    def die(call):
        if next(done) in (2, 6, 14, 27):
            raise InterruptedError

    Calls(monkeypatch, edm.Run, "update", die)
    options |= {"objective": "gan", "save_every": 1, "resume": True}
    while result is None:
        with contextlib.suppress(InterruptedError):
            result = tiny_run(tmp_path, "parts", **options)
    assert result["resumed_from"] == 2
    for stage in ("teacher", "ode_init", "causvid", "self_forcing"):
        files = (tmp_path / run / stage / "generator.safetensors" for run in ("whole", "parts"))
        assert same(*map(cv.load_video_denoiser, files))


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

"""CausVid and Self-Forcing: causality, cache, roll-out, who gets gradients, the options."""

import contextlib
import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from conftest import Gaussian, randomise
from torch.testing import assert_close

import causal_video as cv
import edm_teacher as edm

D64 = torch.float64


def cfg(**changes):
    return cv.Config(**{"device": "cpu", "batch": 4} | changes)


def network(seed=0, **shape):
    torch.manual_seed(seed)
    shape = {"width": 16, "depth": 2, "heads": 2} | shape
    return randomise(edm.VideoDenoiser(**shape), seed).eval()


@pytest.fixture
def net():
    return network()


class VideoSpy(torch.nn.Module):
    """Wraps a denoiser and keeps what it was called with and what it returned."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, []
        self.shape = network.shape
        self.sigma_max, self.label_dim = network.sigma_max, network.label_dim

    def forward(self, x, sigma, labels=None, **how):
        out = self.network(x, sigma, labels, **how)
        plain = out[0] if isinstance(out, tuple) else out
        sigma = torch.as_tensor(sigma)
        self.calls.append({"x": x, "sigma": sigma, "out": plain, "labels": labels} | how)
        self.calls[-1]["kv"] = out[1] if isinstance(out, tuple) else None
        self.calls[-1]["grad"] = torch.is_grad_enabled()
        return out


def videos(n=2, frames=12, seed=0):
    torch.manual_seed(seed)
    return edm.bouncing_shapes(n, frames)


# ---------------------------------------------------------------- preconditioning and noise


def test_denoiser_of_the_exact_velocity_returns_the_clean_video():
    """D = x_t/(1+σ) - σ/(1+σ) F with F = ε - x is x, at every σ, per sample and per frame."""
    torch.manual_seed(0)
    x, eps = torch.randn(2, 3, 1, 4, 8, 8, dtype=D64)
    for sigma in (torch.tensor([0.1, 3.0, 9999.0], dtype=D64), torch.rand(3, 4, dtype=D64) * 9):
        s = sigma.reshape(3, 1, -1, 1, 1)
        seen = []

        class Exact(edm.VideoDenoiser):
            def velocity(self, x_t, t, labels, seen=seen):
                seen.append((x_t, t))
                return eps - x, None, None

        assert_close(Exact()(x + s * eps, sigma), x, rtol=0, atol=1e-9)
        ((x_t, t),) = seen
        t5 = t[:, None, :, None, None]
        assert_close(x_t, (1 - t5) * x + t5 * eps)  # rectified flow's interpolation
        assert_close(t, (sigma / (1 + sigma)).reshape(3, -1).expand(3, 4))


def test_a_clean_frame_comes_back_as_it_is(net):
    """σ = 0: D = x, which EDM's preconditioning does not define."""
    x, labels = videos()
    sigma = torch.tensor([0.0, 2.0]).repeat(2, 6)
    out = net(x, sigma, labels)
    assert torch.equal(out[:, :, ::2], x[:, :, ::2])
    assert not torch.allclose(out[:, :, 1::2], x[:, :, 1::2], atol=0.1)


def test_sigma_may_be_a_number_per_sample_or_per_frame(net):
    x, labels = videos()
    per_sample = net(x, torch.tensor([0.7, 0.7]), labels)
    assert torch.equal(per_sample, net(x, 0.7, labels))
    assert torch.equal(per_sample, net(x, torch.full((2, 12), 0.7), labels))


def test_no_label_is_minus_one_is_none(net):
    x, _ = videos()
    none = net(x, 0.7)
    assert torch.equal(none, net(x, 0.7, torch.tensor([-1, -1])))
    for label in (0, 1):
        assert not torch.allclose(none, net(x, 0.7, torch.tensor([label, label])))


def test_flow_loss_is_the_loss_of_the_velocity():
    """((1+σ)/σ)² (D - x)² = (F - (ε - x))² for D made of F."""
    torch.manual_seed(0)
    x, eps, out = torch.randn(3, 5, 1, 2, 4, 4, dtype=D64)
    sigma = torch.tensor([0.01, 0.3, 1.0, 15.0, 9999.0], dtype=D64)
    s = edm.expand(sigma, x)
    x_t = x + s * eps
    denoised = x_t / (1 + s) - s / (1 + s) * out
    assert_close(cv.flow_loss(denoised, x, sigma), (out - (eps - x)).square().mean())


def test_frames_get_noise_of_their_own_level():
    torch.manual_seed(0)
    sigma = torch.tensor([[0.0, 1.0, 5.0]]).expand(20_000, 3)
    x_t = cv.noised(torch.full((20_000, 1, 3, 1, 1), 2.0), sigma)
    assert torch.equal(x_t[:, :, 0], torch.full_like(x_t[:, :, 0], 2.0))
    assert_close(x_t.std((0, 1, 3, 4)), torch.tensor([0.0, 1.0, 5.0]), rtol=0.03, atol=0)


# ---------------------------------------------------------------- mask and cache

WINDOWS = [(-1, 0), (6, 0), (6, 3), (9, 3), (8, 1)]


def by_cache(net, x_t, sigma, labels, blocks, size, sink, offset=1, forget=False):
    out, past, start = [], {}, 0
    for b, n in enumerate(blocks):
        past = {f: past[f] for f in cv.visible_frames(blocks, b, size, sink)}
        part = slice(start, start + n)
        how = {"past": {} if forget else past, "start": start * offset, "return_kv": True}
        denoised, kv = net(x_t[:, :, part], sigma[:, part], labels, **how)
        out.append(denoised)
        past |= {start + i: [(k[:, :, i], v[:, :, i]) for k, v in kv] for i in range(n)}
        start += n
    return torch.cat(out, 2)


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
@pytest.mark.parametrize("first", [False, True])
def test_mask_and_cache_are_the_same(net, window, sink, first):
    """One call under the block-causal mask = block by block with cached keys and values."""
    blocks = cv.block_layout(12 + first, 3, first)
    x, labels = videos(2, 12 + first)
    sigma = torch.rand(2, len(blocks)).repeat_interleave(torch.tensor(blocks), 1) * 3
    whole = net(x, sigma, labels, mask=cv.block_mask(blocks, window, sink))
    args = net, x, sigma, labels, blocks, window, sink
    assert_close(by_cache(*args), whole, rtol=0, atol=1e-5)
    assert (by_cache(*args, offset=0) - whole).abs().max() > 1e-3  # frame numbers forgotten
    assert (by_cache(*args, forget=True) - whole).abs().max() > 1e-3  # cache dropped
    assert (net(x, sigma, labels) - whole).abs().max() > 1e-3  # mask dropped


def test_changing_a_future_frame_leaves_the_past_bit_identical(net):
    x, labels = videos()
    mask = cv.block_mask([3] * 4)
    before = net(x, 1.0, labels, mask=mask)
    for b in range(1, 4):
        changed = x.clone()
        changed[:, :, 3 * b] += 1  # the first frame of block b
        after = net(changed, 1.0, labels, mask=mask)
        assert torch.equal(after[:, :, : 3 * b], before[:, :, : 3 * b])
        same_block = (after - before)[:, :, 3 * b + 2].abs().max()
        assert same_block > 1e-4  # both directions inside a block


def test_a_roll_out_does_not_know_its_future(net):
    """Another z for the last blocks: the first ones stay the same, to the bit."""
    z, labels, out = torch.randn(2, 1, 12, 8, 8), torch.tensor([0, 1]), []
    for last in (z[:, :, 6:], -z[:, :, 6:]):
        torch.manual_seed(0)
        out.append(cv.generate(net, torch.cat([z[:, :, :6], last], 2), labels, cfg()))
    assert torch.equal(out[0][:, :, :6], out[1][:, :, :6])
    assert not torch.allclose(out[0][:, :, 6:], out[1][:, :, 6:])


def test_rotation_depends_on_differences_of_frame_numbers():
    """q · k after rotation is a function of the two frames' distance."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 1, 8, dtype=D64)
    pairs = [(5, 3), (35, 33), (2, 0)]
    dots = [
        (edm.rotate(q, torch.tensor([a])) * edm.rotate(k, torch.tensor([b]))).sum()
        for a, b in pairs
    ]
    assert_close(dots[0], dots[1])
    assert_close(dots[0], dots[2])
    assert_close(edm.rotate(q, torch.tensor([7])).norm(), q.norm())


@pytest.mark.parametrize(
    ("window", "sink", "last_sees", "kept"),
    [
        (-1, 0, range(12), range(15)),
        (6, 0, [9, 10, 11], range(9, 15)),
        (6, 3, [0, 1, 2], [0, 1, 2, 12, 13, 14]),
        (9, 3, [0, 1, 2, 9, 10, 11], [0, 1, 2, *range(9, 15)]),
        (3, 0, [], [12, 13, 14]),
        (7, 1, [0, 9, 10, 11], [0, *range(9, 15)]),
    ],
)
def test_rolling_cache_holds_the_window_and_the_sink(net, window, sink, last_sees, kept):
    """Five blocks of three: the oldest frames go, the first `sink` stay."""
    blocks, spy = [3] * 5, VideoSpy(net)
    assert cv.visible_frames(blocks, 4, window, sink) == list(last_sees)
    assert cv.block_mask(blocks, window, sink)[-1].nonzero().flatten().tolist() == list(kept)
    settings = cfg(local_attn_size=window, sink_size=sink)
    cv.generate(spy, torch.randn(1, 1, 15, 8, 8), torch.tensor([0]), settings)
    assert spy.calls[-1]["past"].keys() == dict.fromkeys(last_sees).keys()
    for f, layers in spy.calls[-1]["past"].items():  # the keys that were written for that frame
        written = spy.calls[5 * (f // 3) + 4]
        assert written["start"] == f // 3 * 3
        for (k, v), (k_then, v_then) in zip(layers, written["kv"], strict=True):
            assert torch.equal(k, k_then[:, :, f % 3])
            assert torch.equal(v, v_then[:, :, f % 3])
            assert not k.requires_grad


def test_last_block_of_a_training_video_may_be_kept_from_the_first(net):
    """Self-Forcing's remedy for rolling caches: never used to the first frames being there."""
    assert cv.visible_frames([3] * 4, 3, hide_first=True) == list(range(3, 9))
    assert cv.visible_frames([3] * 4, 2, hide_first=True) == list(range(6))
    settings, z = cfg(hide_first_block=True, local_attn_size=-1), torch.randn(1, 1, 12, 8, 8)
    for training, wanted in [(True, list(range(3, 9))), (False, list(range(9)))]:
        spy = VideoSpy(net)
        cv.rollout(spy, z, torch.tensor([0]), settings, training=training)
        assert list(spy.calls[-1]["past"]) == wanted


# ---------------------------------------------------------------- the roll-out


@pytest.mark.parametrize(("exit_step", "calls"), [(0, 14), (3, 35)])
def test_number_of_calls_of_a_roll_out(net, exit_step, calls):
    """Seven blocks: exit + 1 denoising calls and one for the cache, each."""
    spy = VideoSpy(net)
    cv.rollout(spy, torch.randn(1, 1, 21, 8, 8), torch.tensor([0]), cfg(), [exit_step] * 7)
    assert len(spy.calls) == calls
    levels = [c["sigma"].item() for c in spy.calls[: exit_step + 2]]
    assert_close(levels, [*[9999.0, 15.0, 5.0, 5 / 3][: exit_step + 1], 0.0], rtol=1e-5, atol=0)


def test_roll_out_continues_its_own_outputs(net):
    """The context of a block is what the student itself made before: the exit step's output."""
    spy, z, labels = VideoSpy(net), torch.randn(2, 1, 6, 8, 8), torch.tensor([0, 1])
    exits = [1, 2]
    x = cv.rollout(spy, z, labels, cfg(), exits)
    assert_close(spy.calls[0]["x"], 9999 * z[:, :, :3], rtol=1e-5, atol=0)
    made, written = spy.calls[1], spy.calls[2]
    assert torch.equal(written["x"], made["out"])
    assert torch.equal(x[:, :, :3], made["out"])
    assert torch.equal(x[:, :, 3:], spy.calls[5]["out"])
    assert [c["start"] for c in spy.calls] == [0] * 3 + [3] * 4
    assert all(list(c["past"]) == [0, 1, 2] for c in spy.calls[3:])


def test_noise_between_steps_is_fresh(net):
    """x_(k+1) = x̂ + σ_(k+1) ε: the differences are new unit noise."""
    torch.manual_seed(0)
    spy, z = VideoSpy(net), torch.randn(64, 1, 3, 8, 8)
    cv.generate(spy, z, torch.zeros(64, dtype=torch.long), cfg())
    eps = [z] + [(b["x"] - a["out"]) / b["sigma"] for a, b in itertools.pairwise(spy.calls[:4])]
    eps = torch.stack([e.flatten() for e in eps])
    assert_close(eps.std(1), torch.ones(4), rtol=0.03, atol=0)
    assert (torch.corrcoef(eps) - torch.eye(4)).abs().max() < 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_exit_step_of_each_block_gets_gradient(net, checkpointing):
    net.checkpointing = checkpointing
    spy, z = VideoSpy(net), torch.randn(1, 1, 9, 8, 8)
    x = cv.rollout(spy, z, torch.tensor([0]), cfg(), [2, 0, 1], training=True)
    assert [c["out"].requires_grad for c in spy.calls] == [0, 0, 1, 0, 1, 0, 0, 1, 0]
    assert not any(c["x"].requires_grad for c in spy.calls)
    made = [spy.calls[i]["out"] for i in (2, 4, 7)]
    for b in range(3):  # a block's loss does not reach the other blocks: the cache is detached
        loss = x[:, :, 3 * b : 3 * b + 3].square().sum()
        grads = torch.autograd.grad(loss, made, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.abs().sum() > 0) for g in grads] == [
            i == b for i in range(3)
        ]


def test_gradient_is_that_of_the_exit_calls_with_a_constant_cache(net):
    """Weights' gradient of a roll-out = sum over blocks of one call each on detached inputs."""
    z, labels, weights = torch.randn(2, 1, 6, 8, 8), torch.tensor([0, 1]), list(net.parameters())
    found = {}
    for checkpointing in (False, True):
        net.checkpointing = checkpointing
        spy = VideoSpy(net)
        torch.manual_seed(0)
        x = cv.rollout(spy, z, labels, cfg(), [1, 1], training=True)
        found[checkpointing] = torch.autograd.grad(x.pow(3).sum(), weights)
    wanted = 0
    for call in (spy.calls[1], spy.calls[4]):
        out = net(call["x"], call["sigma"], labels, past=call["past"], start=call["start"])
        wanted = wanted + torch.cat(
            [g.flatten() for g in torch.autograd.grad(out.pow(3).sum(), weights)]
        )
    for grads in found.values():
        assert_close(torch.cat([g.flatten() for g in grads]), wanted, rtol=1e-4, atol=1e-4)


def test_only_the_last_frames_of_a_long_roll_out_get_gradient(net):
    """24 frames: no graph for the first 12, which are context."""
    spy = VideoSpy(net)
    cv.rollout(spy, torch.randn(1, 1, 24, 8, 8), torch.tensor([0]), cfg(), [0] * 8)
    exits = [c for c in spy.calls if c["sigma"].max() > 0]
    assert [c["out"].requires_grad for c in exits] == [False] * 4 + [True] * 4


def test_self_forcing_takes_the_end_of_a_training_roll_out_and_its_score_window(net, monkeypatch):
    seen, rollout = [], cv.rollout

    def spy(generator, z, labels, cfg, exits=None, training=False):
        seen.append((rollout(generator, z, labels, cfg, exits, training), exits, training))
        return seen[-1][0]

    monkeypatch.setattr(cv, "rollout", spy)
    settings = cfg(last_step_only=False, ts_schedule=True, ts_schedule_max=True)
    torch.manual_seed(0)
    for _ in range(12):
        given = net, *edm.bouncing_shapes(2, 12), settings
        x, limits, _ = cv.student_video("self_forcing", *given)
        whole, exits, training = seen[-1]
        assert training
        assert torch.equal(x, whole[:, :, -12:])
        assert limits == cv.score_window(exits, settings)
    assert {e[0] for _, e, _ in seen} == {0, 1, 2, 3}
    assert {w.shape[2] for w, *_ in seen} >= {12, 24}


def test_with_a_first_frame_of_its_own_a_long_roll_out_leaves_one_frame_out(net):
    """As Self-Forcing's gradient mask; the clip has 10 frames then."""
    settings = cfg(independent_first_frame=True, num_training_frames=22)
    torch.manual_seed(0)
    real, labels = edm.bouncing_shapes(2, 10)
    firsts = [cv.student_video("self_forcing", net, real, labels, settings)[2] for _ in range(12)]
    assert {*firsts} == {0, 1}


def test_causvid_mask_hides_the_first_block_too(net):
    spy, settings = VideoSpy(net), cfg(hide_first_block=True, local_attn_size=-1)
    cv.student_video("causvid", spy, *videos(), settings)
    assert not spy.calls[0]["mask"][9:, :3].any()
    assert spy.calls[0]["mask"][6:9, :3].all()


@pytest.mark.parametrize("training", [False, True])
def test_context_noise_is_a_label_and_in_training_also_noise(net, training):
    """context_noise 500: the cache is written at σ = 1. In sampling the network, whose c_in is then
    1/2, gets the clean frames themselves, as in Self-Forcing."""
    spy, z = VideoSpy(net), torch.randn(8, 1, 3, 8, 8)
    labels = torch.zeros(8, dtype=torch.long)
    x = cv.rollout(spy, z, labels, cfg(context_noise=500.0), training=training)
    assert_close(spy.calls[-1]["sigma"].item(), 1.0, rtol=1e-6, atol=0)
    if training:
        assert_close((spy.calls[-1]["x"] - x).std(), torch.tensor(1.0), rtol=0, atol=0.06)
    else:
        assert_close(spy.calls[-1]["x"] / 2, x)


def test_gradient_checkpointing_changes_nothing_but_memory(net):
    x, labels = videos()
    out, grads = [], []
    for net.checkpointing in (False, True):
        y = net(x, 1.0, labels, mask=cv.block_mask([3] * 4))
        out.append(y)
        grads.append(torch.autograd.grad(y.square().sum(), list(net.parameters())))
    assert torch.equal(*out)
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


# ---------------------------------------------------------------- the two methods


def test_causvid_trains_on_noised_real_videos_under_the_mask(net):
    """Each block of each sample has one of the steps' σ or 0, of its own (CausVid Alg. 1)."""
    torch.manual_seed(0)
    spy, (real, labels) = VideoSpy(net), videos(400)
    x, window, first = cv.student_video("causvid", spy, real, labels, cfg())
    (call,) = spy.calls
    levels = torch.tensor([9999.0, 15.0, 5.0, 5 / 3, 0.0])
    by_block = call["sigma"].unflatten(1, (4, 3))
    assert torch.equal(by_block, by_block[..., :1].expand_as(by_block))
    share = (by_block[..., 0, None] - levels).abs() < 1e-2
    assert share.any(-1).all()
    assert_close(share.float().mean((0, 1)), torch.full((5,), 0.2), rtol=0, atol=0.05)
    assert torch.equal(call["mask"], cv.block_mask([3] * 4, 6))
    noise = (call["x"] - real).flatten(3).std(-1)[:, 0]
    assert_close(noise, call["sigma"], rtol=0.5, atol=1e-6)
    clean = call["sigma"] == 0
    assert torch.equal(x[:, 0][clean], real[:, 0][clean])
    assert (window, first) == ((0, 1000), 0)


def test_self_forcing_never_looks_at_the_real_video(net):
    real, labels = videos()
    out = []
    for data in (real, torch.full_like(real, 7.0)):
        torch.manual_seed(0)
        out.append(cv.student_video("self_forcing", net, data, labels, cfg())[0])
    assert torch.equal(*out)


def test_long_training_roll_outs_end_in_the_clip_and_leave_a_block_out(net, monkeypatch):
    """num_training_frames 24: 4 to 8 blocks; the score sees the last 12 frames, the loss 9."""
    lengths, rollout = [], cv.rollout

    def spy(generator, z, *args, **how):
        lengths.append(z.shape[2])
        return rollout(generator, z, *args, **how)

    monkeypatch.setattr(cv, "rollout", spy)
    real, labels = videos()
    for _ in range(40):
        with torch.no_grad():
            x, _, first = cv.student_video(
                "self_forcing", net, real, labels, cfg(num_training_frames=24, last_step_only=True)
            )
        assert x.shape == real.shape
        assert first == (3 if lengths[-1] > 12 else 0)
    assert set(lengths) == {12, 15, 18, 21, 24}


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("mode", ["causvid", "self_forcing"])
def test_generator_step_reaches_the_generator_alone(net, mode, objective):
    teacher, fake, settings = network(1), network(2), cfg(objective=objective)
    head = cv.Discriminator(net)
    real, labels = videos(4)
    loss, (x, window), log = cv.generator_step(
        net, teacher, fake, head, settings, mode, real, labels
    )
    loss.backward()
    for other in (teacher, fake, head):
        assert all(p.grad is None for p in other.parameters())
    assert sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None) > 0
    assert not x.requires_grad
    assert log["|grad|"] > 0
    loss, _ = cv.fake_step(fake, head, settings, x, window, real, labels)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all((p.grad is not None) == (objective == "gan") for p in head.parameters())
    assert sum(p.grad.abs().sum() for p in fake.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("mode", ["causvid", "self_forcing"])
def test_every_call_has_the_labels(net, mode, objective):
    generator, teacher, fake = VideoSpy(net), VideoSpy(network(1)), VideoSpy(network(2))
    settings, (real, labels) = cfg(objective=objective), videos(4)
    head = cv.Discriminator(net)
    args = generator, teacher, fake, head, settings, mode, real, labels
    _, made, _ = cv.generator_step(*args)
    cv.fake_step(fake, head, settings, *made, real, labels)
    assert all(
        torch.equal(c["labels"], labels) for n in (generator, teacher, fake) for c in n.calls
    )
    sigmas, blocks = cv.student_sigmas(settings), [3] * 4
    path = cv.ode_path(teacher, torch.randn(4, 1, 12, 8, 8), labels, sigmas, 1, 1.0)
    cv.ode_init_loss(generator, path, sigmas, labels, blocks, cv.block_mask(blocks))
    for spy in (teacher, generator):
        assert torch.equal(spy.calls[-1]["labels"], labels)


def test_loss_begins_at_its_first_frame_and_both_steps_stay_in_the_window(monkeypatch):
    x = torch.zeros(40, 1, 12, 8, 8, requires_grad=True)
    monkeypatch.setattr(cv, "student_video", lambda *args: (x * 1, (250, 500), 3))
    real, fake = Gaussian(0.3, 0.5), Gaussian(-0.2, 0.9)
    args = None, real, fake, None, cfg(), "self_forcing", x.detach(), None
    loss, (made, limits), _ = cv.generator_step(*args)
    loss.backward()
    assert x.grad[:, :, :3].abs().max() == 0
    assert (x.grad[:, :, 3:] != 0).all()
    cv.fake_step(fake, None, cfg(), made, limits, None, None)
    for sigma in (real.calls[0], *fake.calls):  # shift 5: [250, 500) -> [625, 833.3)
        t = 1000 * sigma / (1 + sigma)
        assert t.min() > 624.9
        assert t.max() < 833.4


class Identity(torch.nn.Module):
    """A student whose video is a parameter: its gradient is the one on x."""

    sigma_max, label_dim = 9999.0, 2

    def __init__(self, x):
        super().__init__()
        self.x = torch.nn.Parameter(x)

    def forward(self, x, sigma, labels=None, **how):
        return self.x.expand(len(x), *self.x.shape[1:])


def test_dmd_gradient_on_the_video_is_the_weighted_difference_of_scores():
    """numel dL/dx = (D_fake - D_real) / mean|x - D_real|, one σ for all frames of a video."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 12, 8, 8)
    student, real, fake = Identity(x), Gaussian(0.3, 0.5), Gaussian(-0.2, 0.9)
    args = student, real, fake, None, cfg(), "causvid", x, torch.zeros(4, dtype=torch.long)
    loss, _, _ = cv.generator_step(*args)
    loss.backward()
    (sigma,) = fake.calls
    assert torch.equal(sigma, real.calls[0])
    assert sigma.shape == (4,)
    s2 = edm.expand(sigma, x) ** 2
    # D is affine in x_t: recover x_t's noise from the gradient itself is not possible, so compare
    # through the difference of the two closed forms at the same x_t, drawn again from the seed
    torch.manual_seed(0)
    torch.randn(4, 1, 12, 8, 8)
    cv.student_video("causvid", student, x, args[-1], cfg())
    again = cv.score_sigma(4, (0, 1000), cfg())
    assert torch.equal(again, sigma)
    x_t = cv.noised(x, again)
    d_real, d_fake = ((g.std**2 * x_t + s2 * g.mean) / (g.std**2 + s2) for g in (real, fake))
    weight = (x - d_real).abs().mean((1, 2, 3, 4), keepdim=True)
    assert_close(student.x.grad * x.numel(), (d_fake - d_real) / weight, rtol=1e-3, atol=1e-5)


def test_guidance_scales_are_self_forcings(net):
    """c + w (c - u): w = 3 is ordinary guidance 4; w = 0 asks no unconditional score."""
    seen, guided = [], edm.guided

    def spy(network, x_t, sigma, labels, w):
        seen.append(w)
        return guided(network, x_t, sigma, labels, w)

    real, labels = videos(4)
    cv.guided, before = spy, cv.guided
    try:
        settings = cfg(real_score_guidance_scale=3.0, fake_score_guidance_scale=0.5)
        cv.generator_step(net, net, net, None, settings, "causvid", real, labels)
    finally:
        cv.guided = before
    assert seen == [4.0, 1.5]
    assert cv.teacher_sampler(cfg(real_score_guidance_scale=3.0))[2] == 4.0
    c, u = net(real, 1.0, labels), net(real, 1.0, None)
    assert_close(guided(net, real, 1.0, labels, 4.0), c + 3 * (c - u), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- objectives


def test_sid_loss_and_its_gradient_through_both_scores():
    """r = a x, f = b x: L = w (a-b)((a-1) - α(a-b)) x², w constant; so dL/dx = 2 L / x."""
    torch.manual_seed(0)
    x, a, b, alpha = torch.randn(3, 1, 2, 4, 4, dtype=D64), 0.7, 0.4, 1.2
    loss, grad = cv.gradient_at(x, lambda x: cv.sid_loss(x, a * x, b * x, alpha))
    w = 1 / ((1 - a) * x.abs()).mean((1, 2, 3, 4), keepdim=True)
    each = w * (a - b) * ((a - 1) - alpha * (a - b)) * x**2
    assert_close(loss, each.mean())
    assert_close(grad, 2 * each / x)


def test_sid_step_descends_the_sid_loss_of_teacher_and_fake():
    torch.manual_seed(0)
    x, labels = torch.randn(4, 1, 12, 8, 8), torch.zeros(4, dtype=torch.long)
    student, real, fake = Identity(x), Gaussian(0.3, 0.5), Gaussian(-0.2, 0.9)
    settings = cfg(objective="sid")
    torch.manual_seed(1)
    loss, _, _ = cv.generator_step(student, real, fake, None, settings, "causvid", x, labels)
    loss.backward()
    torch.manual_seed(1)
    cv.student_video("causvid", student, x, labels, settings)
    sigma, y = cv.score_sigma(4, (0, 1000), settings), x.clone().requires_grad_()
    x_t = cv.noised(y, sigma)
    (wanted,) = torch.autograd.grad(cv.sid_loss(y, real(x_t, sigma), fake(x_t, sigma)), y)
    assert_close(student.x.grad, wanted, rtol=1e-3, atol=1e-9)


def test_weight_is_one_number_per_sample_with_several_channels():
    x, r = torch.randn(2, 4, 3, 2, 5, 5)
    assert_close(cv.dmd_weight(x, r).flatten(), 1 / (x - r).abs().flatten(1).mean(1))


def test_sid_with_alpha_one_half_compares_two_distances():
    """α = ½: (r-f)((r-x) - ½(r-f)) = ½ (|r-x|² - |f-x|²)."""
    x, r, f = torch.randn(3, 2, 1, 2, 4, 4, dtype=D64)
    w = 1 / (x - r).abs().mean((1, 2, 3, 4), keepdim=True)
    wanted = (w * ((r - x) ** 2 - (f - x) ** 2)).mean() / 2
    assert_close(cv.sid_loss(x, r, f, 0.5), wanted)


def test_relativistic_loss_compares_pairs():
    """-log σ(l_better - l_worse): log 2 for equal logits, slope -σ(-d) in the difference."""
    a, b = torch.tensor([0.3, -2.0, 5.0], dtype=D64, requires_grad=True), torch.zeros(3, dtype=D64)
    assert_close(cv.relativistic_loss(b, b).item(), math.log(2))
    loss = cv.relativistic_loss(a, b)
    assert_close(loss, -torch.sigmoid(a - b).log().mean())
    (grad,) = torch.autograd.grad(loss, a)
    assert_close(grad, -torch.sigmoid(-a.detach()) / 3)


def test_difference_penalty_is_the_squared_slope():
    """l = g · x: ((l(x + s n) - l(x)) / s)² = (g · n)², whose mean over n is |g|²."""
    g, x = torch.randn(5, dtype=D64), torch.randn(5, dtype=D64)
    n = torch.eye(5, dtype=D64) * math.sqrt(5)
    found = cv.difference_penalty((x @ g).expand(5), (x + 0.01 * n) @ g, 0.01)
    assert_close(found, g.square().sum())


def test_gan_pushes_the_video_up_and_the_discriminator_the_other_way(net):
    """Generator: better = its own; discriminator: better = real; both at one σ and label."""
    seen = []

    def head(backbone, x_t, sigma, labels):
        seen.append((x_t, sigma, labels))
        return x_t.flatten(1).mean(1)

    torch.manual_seed(0)
    real, labels = videos(4)
    student, settings = Identity(torch.zeros(4, 1, 12, 8, 8)), cfg(objective="gan")
    loss, _, log = cv.generator_step(student, None, net, head, settings, "causvid", real, labels)
    loss.backward()
    (x_t, sigma, given), (real_t, again, _) = seen
    assert torch.equal(sigma, again)
    assert torch.equal(given, labels)
    d = x_t.detach().flatten(1).mean(1) - real_t.flatten(1).mean(1)
    slope = edm.expand(-torch.sigmoid(-d) / real.numel(), real).expand_as(real)
    assert_close(student.x.grad, slope, rtol=1e-2, atol=1e-7)
    assert_close(log["GAN loss"], cv.relativistic_loss(d, torch.zeros(4)))
    seen.clear()
    loss, log = cv.fake_step(net, head, settings, real - 1, (0, 1000), real, labels)
    assert [torch.equal(s, seen[0][1]) for _, s, _ in seen] == [True] * 4
    d = seen[0][0].flatten(1).mean(1) - seen[1][0].flatten(1).mean(1)
    penalty = 0.5 * cv.GAN_PENALTY * (log["R1"] + log["R2"])
    assert_close(loss, cv.relativistic_loss(d, torch.zeros(4)) + penalty)
    for clean, near in ((0, 2), (1, 3)):
        assert_close((seen[near][0] - seen[clean][0]).std().item(), cv.GAN_STD, rtol=0.1, atol=0)


def test_gan_penalises_both_slopes_and_trains_the_fakes_encoder(monkeypatch):
    """Discriminator's loss without penalty reaches the fake; R1 and R2 count alike."""
    net, head_of = network(), cv.Discriminator(network())
    for p in head_of.parameters():
        torch.nn.init.normal_(p, std=0.5)
    (x, labels), (real, _), settings = videos(4, seed=1), videos(4), cfg(objective="gan")
    monkeypatch.setattr(cv, "GAN_PENALTY", 0.0)
    loss, _ = cv.fake_step(net, head_of, settings, x, (0, 1000), real, labels)
    loss.backward()
    assert net.blocks[0].qkv.weight.grad.abs().max() > 1e-6
    monkeypatch.setattr(cv, "GAN_PENALTY", 1e6)
    loss, log = cv.fake_step(net, head_of, settings, x, (0, 1000), real, labels)
    assert_close(loss.item(), 5e5 * (log["R1"] + log["R2"]).item(), rtol=1e-2, atol=0)


def test_fake_never_sees_the_real_video():
    torch.manual_seed(0)
    x, fake = 0.3 + 0.5 * torch.randn(600, 1, 12, 2, 2), Gaussian(0.3, 0.5)
    loss, _ = cv.fake_step(fake, None, cfg(), x, (0, 1000), x + 7, None)
    (s,) = fake.calls
    wanted = ((1 + s) / s) ** 2 * 0.25 * s**2 / (0.25 + s**2)
    assert_close(loss, wanted.mean(), rtol=0.02, atol=0)


def test_fake_learns_flow_matching_on_generated_videos():
    """Of the exact denoiser of N(m, s²) the loss is that of quadrature: ((1+σ)/σ)² s²σ²/(s²+σ²)."""
    torch.manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(600, 1, 12, 2, 2)
    fake = Gaussian(0.3, 0.5)
    loss, _ = cv.fake_step(fake, None, cfg(), x, (0, 1000), x, None)
    (sigma,) = fake.calls
    s2 = sigma**2
    wanted = ((1 + sigma) / sigma) ** 2 * 0.25 * s2 / (0.25 + s2)
    assert_close(loss, wanted.mean(), rtol=0.02, atol=0)
    low, high = cv.sigma_of([20, 980]).tolist()
    assert low <= sigma.min()
    assert_close(sigma.max().item(), high)


# ---------------------------------------------------------------- ODE initialisation


def test_ode_path_has_the_states_at_the_students_levels():
    """One point c as data: x(σ) = c + σ/σ_max (x_0 - c) exactly, whatever the steps."""

    class Point(torch.nn.Module):
        sigma_max, label_dim = 9999.0, 2

        def forward(self, x, sigma, labels=None):
            return torch.full_like(x, 0.25)

    z, sigmas = torch.randn(3, 1, 2, 4, 4), cv.student_sigmas(cfg())
    for substeps in (1, 4):
        path = cv.ode_path(Point(), z, None, sigmas, substeps, 1.0)
        ratio = (sigmas / 9999)[None, :, None, None, None, None]
        assert_close(path, 0.25 + ratio * (9999 * z[:, None] - 0.25), rtol=1e-4, atol=1e-4)


def test_ode_path_converges_to_the_exact_flow():
    """N(m, s²): x(0) = m + s (x_0 - m)/√(s² + σ_max²); Euler's error falls with its step."""
    z, sigmas = torch.randn(50, 1, 1, 2, 2), cv.student_sigmas(cfg())
    exact = 0.3 + 0.5 * (9999 * z - 0.3) / math.sqrt(0.25 + 9999**2)
    errors = [
        (cv.ode_path(Gaussian(0.3, 0.5), z, None, sigmas, n, 1.0)[:, -1] - exact).abs().max()
        for n in (4, 16, 64)
    ]
    assert errors[1] < 0.4 * errors[0]
    assert errors[2] < 0.4 * errors[1]


def test_ode_init_regresses_each_block_from_its_own_level(net):
    """Inputs are states of the path at the block's σ; clean frames do not count (CausVid Eq. 6)."""
    torch.manual_seed(0)
    sigmas, blocks = cv.student_sigmas(cfg()), [3] * 4
    path = cv.ode_path(net, torch.randn(32, 1, 12, 8, 8), None, sigmas, 1, 1.0)
    spy = VideoSpy(net)
    mask = cv.block_mask(blocks)
    loss = cv.ode_init_loss(spy, path, sigmas, None, blocks, mask)
    (call,) = spy.calls
    assert call["mask"] is mask
    for k, level in enumerate(sigmas):
        there = call["sigma"] == level
        assert there.float().mean() > 0.1
        assert torch.equal(call["x"][:, 0][there], path[:, k, 0][there])
    error = (call["out"] - path[:, -1]).square()[:, 0]
    assert_close(loss, error[call["sigma"] > 0].mean())


def test_guidance_and_substeps_of_the_teachers_paths(net):
    """Guidance w = 4 is 4 (D_c - D_u) more than D_u, in the first step; 16 steps are 4 times 4."""
    z, labels = torch.randn(2, 1, 3, 8, 8), torch.tensor([0, 1])
    sigmas = torch.tensor([3.0, 1.0])
    c, u, guided = (
        cv.ode_path(net, z, y, sigmas, 1, w)[:, -1]
        for y, w in ((labels, 1), (None, 1), (labels, 4))
    )
    assert_close(guided, u + 4 * (c - u), rtol=1e-4, atol=1e-4)
    assert cv.teacher_sampler(cfg())[1] == 4
    assert cv.teacher_sampler(cfg(real_score_guidance_scale=3.0))[2] == 4


def test_teacher_is_trained_with_shift_5_and_a_tenth_without_label(net, monkeypatch):
    monkeypatch.setattr(cv, "regress", lambda *args: args[-1])
    spy = VideoSpy(net)
    cv.train_teacher(cfg(batch=1000), None)(spy)
    (call,) = spy.calls
    assert_close((call["labels"] == -1).float().mean(), torch.tensor(0.1), rtol=0, atol=0.03)
    assert_close(call["sigma"].median(), torch.tensor(5.0), rtol=0.15, atol=0)


def test_ode_initialisation_is_trained_under_the_window(net, tmp_path, monkeypatch):
    monkeypatch.setattr(cv, "regress", lambda *args: args[-1])
    settings = cfg(out=str(tmp_path / "r"), pairs=4, teacher_steps=4)
    spy, run = VideoSpy(net), edm.Run(settings, "causal_video")
    pairs = cv.make_paths(settings, run, net)
    assert torch.equal(pairs["labels"], torch.tensor([0, 1, 0, 1]))
    cv.train_ode(settings, run, net, pairs)(spy)
    (call,) = spy.calls
    assert torch.equal(call["mask"], cv.block_mask([3] * 4, 6))


# ---------------------------------------------------------------- the options' arithmetic


def test_time_shift_is_a_factor_on_sigma():
    """t' = 1000 k τ/(1 + (k-1) τ): 1000, 750, 500, 250 -> 1000, 937.5, 833.3, 625 for k = 5."""
    found = [cv.shift_timestep(t, 5.0) for t in (1000, 750, 500, 250)]
    assert_close(found, [1000.0, 937.5, 2500 / 3, 625.0], rtol=1e-6, atol=0)
    found = [cv.shift_timestep(1000 * (1 - i / 50), 8.0) for i in (36, 44)]
    assert_close(found, [756.756757, 521.739130], rtol=1e-6, atol=0)  # CausVid's 757, 522
    for t in (1.0, 20.0, 333.0, 980.0):
        before, after = cv.sigma_of([t, cv.shift_timestep(t, 7.0)]).tolist()
        assert_close(after, 7 * before, rtol=1e-6, atol=0)
        assert_close(cv.shift_timestep(cv.shift_timestep(t, 7.0), 1 / 7), t, rtol=1e-9, atol=0)
        assert cv.shift_timestep(t, 1.0) == t


def test_sigma_of_timesteps():
    found = cv.sigma_of([0, 500, 750, 1000])
    assert_close(found, torch.tensor([0.0, 1.0, 3.0, 9999.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("text", "warp", "shift", "sigmas"),
    [
        ("1000,750,500,250", True, 5.0, [9999, 15, 5, 5 / 3, 0]),
        ("1000,750,500,250,0", True, 1.0, [9999, 3, 1, 1 / 3, 0]),
        ("1000,757,522", False, 8.0, [9999, 757 / 243, 522 / 478, 0]),
    ],
)
def test_denoising_steps(text, warp, shift, sigmas):
    settings = cfg(denoising_steps=text, warp_denoising_step=warp, timestep_shift=shift)
    wanted = torch.tensor(sigmas, dtype=torch.float32)
    assert_close(cv.student_sigmas(settings), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ["", "0", "500,750", "1000,1000", "1001,3"])
def test_denoising_steps_must_fall(text):
    with pytest.raises(ValueError, match="denoising-steps"):
        cv.timesteps(text)


@pytest.mark.parametrize(
    ("frames", "n", "first", "blocks"),
    [
        (12, 3, False, [3] * 4),
        (13, 3, True, [1, 3, 3, 3, 3]),
        (4, 1, True, [1] * 4),
        (7, 7, 0, [7]),
    ],
)
def test_layouts_of_blocks(frames, n, first, blocks):
    assert cv.block_layout(frames, n, first) == blocks
    with pytest.raises(ValueError, match="block"):
        cv.block_layout(frames + 1, n, first) if n > 1 else cv.block_layout(0, n, first)


def test_mask_of_the_paper():
    """M_ij = 1 iff ⌊j/k⌋ <= ⌊i/k⌋  (CausVid Eq. 5)."""
    i = torch.arange(12) // 3
    assert torch.equal(cv.block_mask([3] * 4), i[None, :] <= i[:, None])


def test_exit_steps():
    torch.manual_seed(0)
    same = [cv.exit_steps(7, 4, cfg(last_step_only=False)) for _ in range(200)]
    assert all(len(set(e)) == 1 and len(e) == 7 for e in same)
    assert {e[0] for e in same} == {0, 1, 2, 3}
    own = torch.tensor(
        [
            cv.exit_steps(7, 4, cfg(last_step_only=False, same_step_across_blocks=False))
            for _ in range(400)
        ]
    )
    assert_close(own.float().mean(0), torch.full((7,), 1.5), rtol=0, atol=0.2)
    assert any(len(set(e.tolist())) > 1 for e in own)
    assert cv.exit_steps(7, 4, cfg(last_step_only=True)) == [3] * 7


FLAGS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize(("schedule", "schedule_max", "same"), FLAGS)
def test_score_windows_for_every_combination_of_flags(schedule, schedule_max, same):
    """Exit e: from 1000 - 250 e to 1000 - 250 (e + 1); lower end, upper end, or [min, 1000)."""
    settings = cfg(ts_schedule=schedule, ts_schedule_max=schedule_max, min_score_timestep=100)
    settings.same_step_across_blocks = same
    for e, (high, low) in enumerate([(1000, 750), (750, 500), (500, 250), (250, 0)]):
        wanted = (low if schedule and same else 100, high if schedule_max and same else 1000)
        assert cv.score_window([e] * 4, settings) == wanted
    assert cv.score_window(None, settings) == (100, 1000)  # CausVid has no exit step


def test_score_windows_are_meant_before_the_shift():
    """Steps given after the shift (no warping) are taken back: 937.5 -> 750 and so on."""
    settings = cfg(ts_schedule=True, ts_schedule_max=True, warp_denoising_step=False)
    settings.denoising_steps = "1000,938,833,625"
    assert [cv.score_window([e], settings) for e in range(4)] == [
        (752, 1000),
        (499, 752),
        (250, 499),
        (0, 250),
    ]


def test_score_timesteps_are_drawn_then_shifted_then_clamped():
    """Shift 5 on {0 ... 999}, clamp [20, 980]: mean 745.7, and 9.2 % exactly at 980."""

    def draw(n, limits, **options):
        sigma = cv.score_sigma(n, limits, cfg(**options)).double()
        return 1000 * sigma / (1 + sigma)

    torch.manual_seed(0)
    t = draw(200_000, (0, 1000))
    assert_close(t.mean().item(), 745.7, rtol=0, atol=1.5)
    assert_close((t > 979.99).double().mean().item(), 0.092, rtol=0, atol=0.003)
    assert_close([t.min().item(), t.max().item()], [20.0, 980.0], rtol=1e-5, atol=0)
    t = draw(10_000, (250, 500))
    assert t.min() > 624.9
    assert t.max() < 2500 / 3
    t = draw(1000, (7, 8), timestep_shift=1.0, min_timestep_ratio=0.0, max_timestep_ratio=1.0)
    assert_close(t, torch.full_like(t, 7.0), rtol=1e-6, atol=0)


def test_impossible_options_are_one_sentence():
    for bad, word in [
        ({"mode": "x"}, "mode"),
        ({"objective": "x"}, "objective"),
        ({"data": "mnist"}, "data"),
        ({"num_training_frames": 13}, "13 frames"),
        ({"local_attn_size": 5, "sink_size": 3}, "local-attn-size 5"),
        ({"min_score_timestep": 800, "ts_schedule_max": True}, "800 and 750"),
        ({"timestep_shift": 0.0}, "timestep-shift > 0"),
        ({"clip": 0.0}, "clip > 0"),
        ({"context_noise": -5.0}, "0 <= --context-noise"),
        ({"context_noise": 1000.0}, "0 <= --context-noise"),
        ({"min_timestep_ratio": 0.0}, "0 < --min-timestep-ratio"),
        ({"min_timestep_ratio": 0.9, "max_timestep_ratio": 0.1}, "< --max-timestep-ratio"),
        ({"num_frame_per_block": 24, "local_attn_size": -1}, "12 frames are not"),
        ({"independent_first_frame": True}, "24 frames are not 1 .* change --num-training-frames"),
        ({"denoising_steps": "1000,0,500"}, "falling"),
        ({"generator_update_interval": 0}, "generator-update-interval 0"),
        ({"num_frame_per_block": 0}, "num-frame-per-block 0"),
    ]:
        with pytest.raises(ValueError, match=word):
            cv.main(cfg(**bad))


# ---------------------------------------------------------------- data and metric


def test_every_frame_of_the_data_is_in_the_template_bank():
    """Residual 0; brightness is found again, constant in a video, uniform in [0.6, 2]."""
    x, labels = videos(400, 36)
    assert x.shape == (400, 1, 36, 8, 8)
    a, residual = edm.fit_shapes(x, labels)
    assert residual.max() < 1e-6
    assert (a - a[:, :1]).abs().max() < 1e-4
    assert_close(a.std(0).mean().item(), 1.4 / math.sqrt(12), rtol=0.1, atol=0)
    assert a.min() >= 0.5999
    assert a.max() <= 2.0001
    assert x.min() >= -1
    wrong = edm.fit_shapes(x, 1 - labels)[1]
    assert wrong.mean() > 100 * residual.mean()  # a disc is no square


def test_shapes_move_every_frame_and_bounce():
    """Velocity is 1 to 3 quarters of a pixel along each axis; the centre stays in [2, 6]."""
    x, _ = videos(200, 36)
    y = torch.arange(8) + 0.5
    mass = (x + 1)[:, 0]
    centre = torch.stack([mass.sum(3) @ y, mass.sum(2) @ y], -1) / mass.sum((2, 3))[..., None]
    assert centre.min() > 1.9
    assert centre.max() < 6.1
    moved = centre.diff(dim=1).abs()
    assert moved.max() < 0.85  # a little more where the shape's edge is cut
    assert moved.median() > 0.2


def test_drift_measures_what_was_done_to_the_data():
    """Brightness a (1 + k/2) in block k: bias, spread and correlation in closed form."""
    x, labels = videos(300, 12)
    factor = 1 + torch.arange(4).repeat_interleave(3)[:, None, None] / 2
    row = edm.drift((x + 1) * factor - 1, labels, [3] * 4)
    a = edm.fit_shapes(x, labels)[0][:, 0]
    for k in range(4):
        assert_close(row["bias"][k], (a.mean() * k / 2).item(), rtol=1e-3, atol=1e-4)
        assert_close(row["spread"][k], (a.std() * (1 + k / 2)).item(), rtol=1e-3, atol=1e-4)
        assert_close(row["correlation"][k], 1.0, rtol=1e-3, atol=0)
        assert row["residual"][k] < 1e-5
    x[:, :, 3:6] += 0.3 * torch.randn(300, 1, 3, 8, 8)
    row = edm.drift(x, labels, [3] * 4)
    assert_close(row["residual"][1], 0.09, rtol=0.15, atol=0)
    x[:, :, 9:] = x[:, :, 9:].flip(0)
    assert abs(edm.drift(x, labels, [3] * 4)["correlation"][3]) < 0.3


# ---------------------------------------------------------------- training


def tiny_run(tmp_path, name, **changes):
    options = {"out": str(tmp_path / name), "steps": 2, "batch": 2, "teacher_steps": 4}
    options |= {"pairs": 4, "ode_updates": 2, "eval_n": 10, "generator_update_interval": 2}
    return cv.main(cfg(**options | {"teacher": str(tmp_path / "t.safetensors")} | changes))


@pytest.fixture
def saved(tmp_path, net):
    edm.save_video_denoiser(net, tmp_path / "t.safetensors")
    return tmp_path


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
def test_a_tiny_run_from_end_to_end(saved, objective):
    """All stages; result.json has the lists that were promised; a GIF, curves and strips."""
    result = tiny_run(saved, "run", objective=objective)
    on_disk = json.loads((saved / "run" / "result.json").read_text())
    assert on_disk == json.loads(json.dumps(result))
    metrics = result["metrics"]
    assert list(metrics) == ["data", "teacher", "ode_init", "causvid", "self_forcing"]
    for name, row in metrics.items():
        for key in ("residual", "bias", "spread", "correlation"):
            assert len(row[key]) == (4 if name == "teacher" else 12)
            assert all(math.isfinite(v) for v in row[key])
        assert row["bias"][0] == 0
        assert row["frames_per_second"] > 0
    for name in ("samples.png", "samples.gif", "drift.png", "ode_init/curves.png"):
        assert (saved / "run" / name).stat().st_size > 0
    for mode in ("causvid", "self_forcing"):
        for name in ("generator.safetensors", "samples_2.png", "denoised.png", "checkpoint.pt"):
            assert (saved / "run" / mode / name).stat().st_size > 0


def test_gif_has_a_picture_for_every_frame(tmp_path):
    from PIL import Image

    x, _ = videos(8, 12)
    edm.save_gif(tmp_path / "a.gif", [x, x[:, :, :4]])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 12
        assert gif.size == (6 * 8 * 5, 2 * 10 * 5)


@pytest.mark.parametrize("options", [{}, {"objective": "gan"}, {"last_step_only": False}])
def test_resumed_runs_are_bit_identical(saved, options, monkeypatch):
    """4 updates of each student in one go, or killed in the third of each: the same weights."""
    for module, name in [(edm, "save_rows"), (edm, "save_gif"), (edm, "save_lines")]:
        monkeypatch.setattr(module, name, lambda *args, **how: None)  # slow, and drawn elsewhere
    monkeypatch.setattr(edm.Run, "curves", lambda self: None)
    tiny_run(saved, "whole", steps=4, **options)
    step = cv.generator_step
    for allowed in (2, 4, 2):  # CausVid 1, 2; CausVid 3, 4 and Self-Forcing 1, 2; the rest
        left = iter(range(allowed))

        def dies(*args, left=left):
            if next(left, None) is None:
                raise InterruptedError
            return step(*args)

        monkeypatch.setattr(cv, "generator_step", dies)
        with contextlib.suppress(InterruptedError):
            tiny_run(saved, "parts", steps=4, save_every=1, resume=True, **options)
    assert next(left, None) is None
    for mode in ("causvid", "self_forcing"):
        a, b = (
            edm.load_tensors(saved / name / mode / "generator.safetensors")[0]
            for name in ("whole", "parts")
        )
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_folder_with_a_run_in_it_needs_resume(saved, monkeypatch):
    """A finished run only prints its verdict again."""
    result = tiny_run(saved, "run", mode="causvid")
    monkeypatch.setattr(cv, "evaluate", None)
    assert tiny_run(saved, "run", mode="causvid", resume=True) == json.loads(json.dumps(result))
    with pytest.raises(ValueError, match="--resume"):
        tiny_run(saved, "run", mode="causvid")


def test_a_new_teacher_can_be_trained(saved):
    result = tiny_run(saved, "run", teacher="new", teacher_updates=3, mode="causvid")
    assert (saved / "run" / "teacher" / "generator.safetensors").exists()
    assert len(result["metrics"]["teacher"]["residual"]) == 4


def test_the_first_frame_may_be_a_block_of_its_own(saved):
    options = {"independent_first_frame": True, "num_training_frames": 10, "mode": "self_forcing"}
    metrics = tiny_run(saved, "run", **options)["metrics"]
    assert len(metrics["teacher"]["bias"]) == 4
    assert len(metrics["self_forcing"]["bias"]) == 10


def test_a_generator_can_be_sampled_without_training(saved, net):
    settings = cfg(sample=str(saved / "t.safetensors"), out=str(saved))
    assert cv.main(settings) == {}
    assert (saved / "sampled.gif").exists()
    again = edm.load_video_denoiser(saved / "t.safetensors")
    x, labels = videos()
    assert torch.equal(again(x, 1.0, labels), net(x, 1.0, labels))


def test_other_files_are_refused_in_one_sentence(tmp_path):
    edm.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"network": {}})
    with pytest.raises(ValueError, match="holds no video denoiser"):
        edm.load_video_denoiser(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        edm.load_video_denoiser(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("interval", [1, 3])
def test_interval_counts_fake_updates_per_generator_update(tmp_path, net, monkeypatch, interval):
    """The first on the generator's own videos, the others on new ones."""
    made, used, reals = [], [], []
    generator_step, fake_step = cv.generator_step, cv.fake_step

    def spy_generator(*args):
        out = generator_step(*args)
        made.append(out[1][0])
        return out

    def spy_fake(fake, discriminator, cfg, x, *args):
        used.append(x)
        reals.append(args[1])
        return fake_step(fake, discriminator, cfg, x, *args)

    monkeypatch.setattr(cv, "generator_step", spy_generator)
    monkeypatch.setattr(cv, "fake_step", spy_fake)
    settings = cfg(out=str(tmp_path / "r"), steps=3, generator_update_interval=interval)
    run, before = edm.Run(settings, "causal_video"), net.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    net.requires_grad_(False)
    ema = cv.train(settings, run, "self_forcing", net, net)
    assert (len(made), len(used)) == (3, 3 * interval)
    assert all(a is b for a, b in zip(made, used[::interval], strict=True))
    for videos in (used, reals):
        assert len({x.sum().item() for x in videos}) == 3 * interval
    assert not any(x.requires_grad for x in used)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert any(not torch.equal(v, ema.state_dict()[k]) for k, v in before.items())


def test_training_starts_at_initialisation_and_teacher_and_returns_the_average(
    tmp_path, monkeypatch
):
    """Also: the learning rates fall to 0, each network has its own, the gradient is clipped."""
    teacher, start, step, seen = network(1), network(2), cv.generator_step, []
    rates, update = [], cv.update

    def spy(generator, given, fake, *args):
        states = [copy.deepcopy(n.state_dict()) for n in (generator, fake)]
        seen.append((generator, *states))
        return step(generator, given, fake, *args)

    def spy_update(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        update(optimizer, *args)
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        assert torch.nn.utils.get_total_norm(grads) < 1.001e-3

    monkeypatch.setattr(cv, "generator_step", spy)
    monkeypatch.setattr(cv, "update", spy_update)
    settings = cfg(out=str(tmp_path / "r"), steps=3, clip=1e-3, generator_update_interval=1)
    run = edm.Run(settings, "causal_video")
    ema = cv.train(settings, run, "causvid", teacher.requires_grad_(False), start)
    for got, wanted in ((seen[0][1], start), (seen[0][2], teacher)):
        assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in got.items())
    wanted = {k: v.clone() for k, v in start.state_dict().items()}
    after = [s[1] for s in seen[1:]] + [seen[0][0].state_dict()]
    for k, weights in enumerate(after, 1):  # ema_update: d = min(0.99, k / (4 + k))
        d = k / (4 + k)
        wanted = {n: d * v + (1 - d) * weights[n] for n, v in wanted.items()}
    for n, v in ema.state_dict().items():
        assert_close(v, wanted[n], rtol=1e-4, atol=1e-6)
    assert_close(rates, [3e-4 * 0.75, 5e-4 * 0.75, 3e-4 * 0.25, 5e-4 * 0.25, 0.0, 0.0])


def test_evaluation_has_the_labels_and_the_window(tmp_path):
    teacher, student = VideoSpy(network(1)), VideoSpy(network(2))
    settings = cfg(out=str(tmp_path / "r"), eval_n=10)
    run = edm.Run(settings, "causal_video")
    cv.evaluate(settings, run, teacher, {"student": student})
    for call in teacher.calls + student.calls:
        assert torch.equal(call["labels"], torch.arange(10) % 2)
    assert max(len(c["past"]) for c in student.calls) == 3
    assert max(c["start"] for c in student.calls) == 33


@pytest.mark.parametrize("frames", [3, 12])
def test_a_clip_of_one_block_has_no_drift_and_no_longer_roll_out(saved, frames):
    more = {"num_frame_per_block": frames, "num_training_frames": frames, "local_attn_size": -1}
    rows = tiny_run(saved, "r", **more)["metrics"]
    assert len(rows["teacher"]["correlation"]) == 1
    with pytest.raises(edm.UserError, match="a clip is one block"):
        cv.check(cfg(num_frame_per_block=12, local_attn_size=-1))


@pytest.mark.parametrize("wrong", [{"last_step_only": False}, {"gradient_checkpointing": True}])
def test_the_command_that_resumes_a_run_has_its_switches(tmp_path, monkeypatch, wrong):
    """--no-last-step-only: switches that are on unless told."""
    settings = cfg(out=str(tmp_path / "r"), **wrong)
    words = edm.shlex.split(edm.Run(settings, "causal_video").command())
    monkeypatch.setattr(edm.sys, "argv", words[1:])
    assert edm.parse_config(cv.Config) == dataclasses.replace(settings, resume=True)


def test_a_finished_run_is_measured_again_with_another_eval_n(saved):
    for n in (10, 20):
        rows = tiny_run(saved, "r", mode="causvid", eval_n=n, resume=True)["metrics"]
        assert rows["causvid"]["n"] == n

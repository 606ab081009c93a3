"""What the four image scripts promise alike: training loop, run folder, pictures, verdict."""

import copy
import dataclasses
import math

import pytest
import torch
from conftest import TINY, Calls, Spy, make_denoiser, randomise
from torch import nn
from torch.testing import assert_close

import dmd2_cifar
import dmd_mnist
import edm_teacher as edm
import f_distill
import ladd
from tools import plot

MORE = {  # options with which a run draws all random numbers that it can draw
    dmd_mnist: {},
    dmd2_cifar: {"sampling_steps": 2, "r1_weight": 1.0, "warmup": 3},
    f_distill: {"sampling_steps": 2, "r1_weight": 1.0, "warmup": 3, "f": "kl"},
    ladd: {"sampling_steps": 2, "r1_weight": 1.0, "loss": "softplus"},
}


@pytest.fixture(params=MORE, ids=lambda s: s.__name__)
def script(request):
    """Every test that asks for it runs with all four, unless `only` names fewer."""
    return request.param


def only(*scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda s: s.__name__)


with_gan = only(dmd2_cifar, f_distill, ladd)


@pytest.fixture
def calls(script, monkeypatch):
    """calls(name): what is called by this name in the script, see Calls."""
    return lambda name, before=None, owner=script: Calls(monkeypatch, owner, name, before)


def second(script):
    """The network of step B."""
    return "discriminator" if script is ladd else "fake"


def train(script, teacher, out, drawn=0, **changes):
    """A few updates on 8 x 8 pixels, in class k from 60 k to 60 k + 59; returns the average."""
    few = {"data": "synthetic", "device": "cpu", "batch": 4, "steps": 3, "ratio": 2}
    cfg = script.Config(**{"save_every": 99, "out": str(out)} | few | changes)
    run, classes = edm.Run(cfg, script.__name__), torch.arange(32) % 4
    torch.rand(drawn)  # as a metric does that is trained first
    images = torch.randint(60, (32, 64), generator=torch.Generator().manual_seed(0))
    images = (60 * classes[:, None] + images).to(torch.uint8).reshape(32, 1, 8, 8)
    if script is not dmd_mnist:
        return script.train(cfg, run, teacher, images, classes)
    pairs = {"z": edm.noise(teacher, 32, 0), "y": edm.to_float(images), "labels": classes}
    return script.train(cfg, run, teacher, pairs)


def saved(out):
    """{name: [weights, state of the optimiser]} of the checkpoint."""
    return torch.load(out / "checkpoint.pt", weights_only=True)["trained"]


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


def test_generate_is_one_call_at_sigma_max(script, tiny):
    """G(z) = D(80 z; 80, y): what load_denoiser's users call."""
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 3])
    assert_close(script.generate(tiny, z, labels), tiny(80 * z, 80.0, labels), rtol=0, atol=0)


@pytest.mark.parametrize("ratio", [1, 3])
def test_ratio_counts_updates_the_first_on_the_generators_x(script, calls, tiny, tmp_path, ratio):
    """R of fake or heads for one of the generator (DMD Alg. 1, DMD2 §4.2), the others on new x.

    New is x = G(x_t, σ, y) of the updated generator, not of its average; step B is told this y."""
    a_steps, updates, drawn = calls("generator_step"), calls("update", owner=edm.Run), set()

    def check(b):
        generator, first = a_steps[-1].generator, a_steps[-1].result[1]
        if b.x is not first:
            last = generator.calls[-1]
            with torch.no_grad():
                assert torch.equal(b.x, generator(last.x, last.sigma, last.labels))
            assert torch.equal(b.labels, last.labels)
            drawn.add(last.x.sum().item())

    b_steps = calls(f"{second(script)}_step", check)
    train(script, Spy(tiny), tmp_path, ratio=ratio)
    assert [u.name for u in updates] == (["generator"] + [second(script)] * ratio) * 3
    for a, b in zip(a_steps, b_steps[::ratio], strict=True):
        assert b.x is a.result[1]
        assert torch.equal(b.labels, a.labels if script is dmd_mnist else a.inputs[-1])
    assert not any(b.x.requires_grad for b in b_steps)
    assert len({b.x.sum().item() for b in b_steps}) == 3 * ratio
    assert len(drawn) == 3 * (ratio - 1)
    assert {*torch.cat([b.labels for b in b_steps]).tolist()} == {0, 1, 2, 3}
    if script is not dmd_mnist:
        assert len({b.real.sum().item() for b in b_steps}) == 3 * ratio


def test_all_but_the_teacher_learn_each_with_its_own_optimiser(script, calls, tiny, tmp_path):
    """AdamW over generator, or fake and heads, alone, with its own rate; --beta1, --beta2 reach it.

    The teacher stays bit-identical, frozen, in eval mode."""
    rates, more = {"generator": 1e-4, second(script): 3e-4}, {"beta1": 0.3, "beta2": 0.7}
    more, betas = ({}, (0.0, 0.99)) if script is dmd_mnist else (more, (0.3, 0.7))
    before, first = copy.deepcopy(tiny.state_dict()), {}

    def keep(update):
        first.setdefault(update.network, copy.deepcopy(dict(update.network.named_parameters())))

    a_steps, updates = calls("generator_step"), calls("update", keep, owner=edm.Run)
    train(script, tiny, tmp_path, **{f"lr_{name}": rate for name, rate in rates.items()}, **more)
    assert len(first) == 2
    for u in updates:
        assert isinstance(u.optimizer, torch.optim.AdamW)
        (group,) = u.optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in u.network.parameters()}
        fallen = 2 / 3 if script is ladd and u.name == "generator" else 1  # after 3 of 3 steps
        assert_close((group["lr"], *group["betas"]), (rates[u.name] * fallen, *betas))
        for name, p in u.network.named_parameters():  # as they are after the last update
            assert not torch.equal(p, first[u.network][name]), name
    assert updates[0].network is a_steps[0].generator
    for name in {"fake", "discriminator"} & vars(a_steps[0]).keys():
        assert getattr(a_steps[0], name) in set(updates[1].network.modules())
    assert same(tiny.state_dict(), before)
    assert not any(m.training for m in tiny.modules())
    assert not any(p.requires_grad for p in tiny.parameters())
    assert all(a.teacher is tiny for a in a_steps)


@pytest.mark.parametrize("decay", [0.4, 0.0])
def test_result_is_the_average_of_the_generators(script, calls, tiny, tmp_path, decay):
    """ema_k = d ema_(k-1) + (1 - d) generator_k, d = min(decay, k / (4 + k)); 0: the generator."""
    name, history = "model.map_layer0.weight", []
    calls("generator_step", lambda a: history.append(a.generator.state_dict()[name].clone()))
    result = train(script, tiny, tmp_path, ema=decay)
    expected, *after = *history, saved(tmp_path)["generator"][0][name]
    for k, weight in enumerate(after, 1):
        d = min(decay, k / (4 + k))
        expected = d * expected + (1 - d) * weight
    assert_close(result.state_dict()[name], expected)
    assert same(result.state_dict(), saved(tmp_path)["ema"][0])


def test_neither_resume_nor_pictures_change_a_run(script, tiny, tmp_path, monkeypatch):
    """3 steps, or 1 and 2 more with pictures after each: equal weights, equal moments of AdamW."""

    def stop(self, step, values, **how):
        if step == 2:
            raise KeyboardInterrupt

    train(script, tiny, tmp_path / "whole", **MORE[script])
    with monkeypatch.context() as patch:
        patch.setattr(edm.Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            train(script, tiny, tmp_path / "parts", save_every=1, **MORE[script])
    train(script, tiny, tmp_path / "parts", resume=True, save_every=1, **MORE[script])
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert sum(moments is not None for _, moments in whole.values()) == 2
    for name, (weights, moments) in whole.items():
        assert_close(parts[name][0], weights, rtol=0, atol=0)
        if moments:
            assert_close(parts[name][1]["state"], moments["state"], rtol=0, atol=0)


def test_weights_depend_on_the_seed_alone(script, tiny, tmp_path):
    """Fresh heads too come from --seed, whatever was drawn before."""
    runs = [{"drawn": 0}, {"drawn": 9}, {"seed": 1}]
    a, b, c = (train(script, tiny, tmp_path / str(k), **run) for k, run in enumerate(runs))
    assert same(a.state_dict(), b.state_dict())
    assert not same(a.state_dict(), c.state_dict())


@pytest.mark.parametrize("which", [0, 1])
def test_nan_stops_before_it_reaches_the_weights(script, calls, tiny, tmp_path, which):
    """The message says where; the last checkpoint stays."""
    name, before = ("generator", second(script))[which], []

    def poison(update):
        before.append(copy.deepcopy(update.network.state_dict()))
        if (update.name, update.step) == (name, 3):
            update.loss = update.loss * math.nan

    updates = calls("update", poison, owner=edm.Run)
    message = f"Step 3: {name} loss is not finite. Lower a learning rate.*checkpoint.pt"
    with pytest.raises(ValueError, match=message):
        train(script, tiny, tmp_path, save_every=2)
    assert same(updates[-1].network.state_dict(), before[-1])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_pictures_show_the_average_and_the_denoisers(script, calls, tiny, tmp_path):
    """samples_<step>.png: G(z) for fixed z; denoised.png: rows x, x + n, D_real, D_fake; σ = 1."""
    a_steps = calls("generator_step")
    average = train(script, tiny, tmp_path)
    denoisers = [tiny] if script is ladd else [tiny, a_steps[0].fake]
    z, labels = edm.noise(tiny, 32, 20000), edm.class_labels(32, 4)
    with torch.no_grad():
        x = script.generate(average, z, labels)
        noisy = script.generate(average, z[:16], labels[:16]) + edm.noise(tiny, 16, 30000)
        denoised = [d(noisy, torch.ones(16), labels[:16]) for d in denoisers]
    edm.save_grid(tmp_path / "samples.png", x)
    edm.save_grid(tmp_path / "rows.png", x[:16], noisy, *denoised)
    for shown, wanted in [("samples_3.png", "samples.png"), ("denoised.png", "rows.png")]:
        assert (tmp_path / shown).read_bytes() == (tmp_path / wanted).read_bytes()


@with_gan
def test_amp_reaches_every_call_but_no_logits(script, calls, tiny, tmp_path, monkeypatch):
    """bfloat16 in all networks, for new samples and the sampler's steps too; logits in float32."""
    layers, logits = calls("forward", owner=edm.Conv2d), calls("gan_discriminator_loss")
    monkeypatch.setattr(edm.Run, "pictures", lambda *args: None)
    for amp, dtype in [(True, torch.bfloat16), (False, torch.float32)]:
        layers.clear()
        train(script, tiny, tmp_path / str(amp), amp=amp, sampling_steps=2)
        assert {c.result.dtype for c in layers if len(c.x) > 1} == {dtype}
    assert {c.logits_real.dtype for c in logits} == {torch.float32}


@with_gan
def test_real_images_and_labels_stay_together(script, calls, tiny, tmp_path):
    """Where the generator's inputs are noised images, its labels are theirs, too."""
    more = {} if script is ladd else {"multistep_input": "data"}
    b_steps = calls(f"{second(script)}_step")
    train(script, tiny, tmp_path, sampling_steps=2, **more)
    for b in b_steps:
        assert torch.equal(edm.to_uint8(b.real)[:, 0, 0, 0].long() // 60, b.real_labels)
        assert torch.equal(b.labels, b.real_labels)


# ---------------------------------------------------------------- the whole script


@pytest.fixture
def options(script, tiny_teacher, tmp_path):
    """options(...): those of a main that takes a second."""
    few = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 1, "eval_n": 40, "batch": 4}
    few |= {"pairs": 8, "pair_steps": 2} if script is dmd_mnist else {"teacher_steps": 2}
    few |= {"device": "cpu", "out": str(tmp_path / "run")}
    return lambda **changes: script.Config(**few | changes)


@pytest.fixture
def no_titles(monkeypatch):
    """Without titled pictures, which take the most time."""
    monkeypatch.setattr(plot, "save_rows", lambda path, rows: None)
    monkeypatch.setattr(plot, "curves", lambda run: None)


def test_main_writes_everything_and_resume_repeats_it(script, calls, options, tmp_path, capsys):
    """Rows at one n with their calls; every sampler takes --sampling-steps; the average is kept."""
    samplers, a_steps, run = calls("generate"), calls("generator_step"), tmp_path / "run"
    k, more = (1, {}) if script is dmd_mnist else (2, {"sampling_steps": 2, "gan_levels": "14"})
    result = script.main(options(steps=2, **more))
    for name in ("samples.png", "samples_2.png", "denoised.png", "curves.png", "log.jsonl"):
        assert (run / name).stat().st_size > 0
    metrics, printed = result["metrics"], capsys.readouterr().out
    for name in ["teacher", "generator", "floor"] + (["start"] if more else []):
        assert metrics[name]["n"] == 40
        assert name in printed
    assert [metrics[name]["nfe"] for name in ("teacher", "generator")] == [3, k]
    assert {"synthetic_fd", "accuracy", "recall", "coverage"} <= metrics["generator"].keys()
    assert {getattr(call, "steps", 1) for call in samplers} == {k}
    assert not more or a_steps[0].discriminator.chosen == [0]
    generator = edm.load_denoiser(run / "generator.safetensors")
    assert same(generator.state_dict(), saved(run)["ema"][0])
    again = script.main(options(steps=2, resume=True, **more))
    assert again["resumed_from"] == 2
    for name, row in metrics.items():
        assert again["metrics"][name]["synthetic_fd"] == row["synthetic_fd"]


@pytest.mark.parametrize("rate", [1e-3, 0.0])
def test_verdict_has_teacher_start_generator(script, calls, options, no_titles, tmp_path, rate):
    """samples.png: from the same z; start: the generator before training, where rate 0 keeps it."""
    pictures, cfg = calls("save_rows", owner=plot), options(guidance=2.0, lr_generator=rate)
    rows = script.main(cfg)["metrics"]
    files = cfg.teacher, tmp_path / "run" / "generator.safetensors"
    teacher, generator = (edm.load_denoiser(file) for file in files)
    z, labels = edm.noise(teacher, 64, 20000), edm.class_labels(64, 4)
    with torch.no_grad():
        y = edm.heun_sampler(teacher, z, labels, steps=2, guidance=2.0)
        start, x = (script.generate(network, z, labels) for network in (teacher, generator))
    start = {} if script is dmd_mnist else {"start, 1 NFE": start}
    wanted = {"teacher, 6 NFE": y} | start | {"generator, 1 NFE": x}
    assert list(pictures[0].rows) == list(wanted)
    assert_close(pictures[0].rows, wanted, rtol=1e-3, atol=1e-3)
    if start:
        fd = {name: row["synthetic_fd"] for name, row in rows.items()}
        assert (fd["start"] == fd["generator"]) == (rate == 0)
        assert fd["teacher"] not in (fd["start"], fd["generator"])


def test_sample_draws_the_wanted_classes_without_training(script, tiny_teacher, tmp_path):
    """sampled.png is G(z, y) with y = 3, 1, 3, 1; classes that are none are refused."""
    steps = () if script is dmd_mnist else (2,)
    few = {"sample": str(tiny_teacher), "n": 4, "device": "cpu", "out": str(tmp_path)}
    few |= {"sampling_steps": 2} if steps else {}
    script.main(script.Config(**few, labels="3,1"))
    generator, y = edm.load_denoiser(tiny_teacher), torch.tensor([3, 1, 3, 1])
    with edm.own_random_numbers(0), torch.no_grad():
        x = script.generate(generator, edm.noise(generator, 4, 0), y, *steps)
    edm.save_grid(tmp_path / "wanted.png", x)
    assert (tmp_path / "sampled.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()
    assert not (tmp_path / "run.json").exists()
    with pytest.raises(ValueError, match="0 to 3"):
        script.main(script.Config(**few, labels="3,7"))


def test_unconditional_teachers_work(script, calls, options, no_titles, monkeypatch, tmp_path):
    """No network sees a label, and there is no accuracy. Guidance has nothing to guide."""
    network = make_denoiser(TINY | {"label_dim": 0, "img_resolution": 28})
    teacher = Spy(randomise(network).eval().requires_grad_(False))
    monkeypatch.setattr(script, "load_teacher", lambda cfg, run: teacher)
    a_steps, more = calls("generator_step"), {"real": "teacher"} if script is ladd else {}
    rows = script.main(options(eval_n=20, **more))["metrics"]
    for spy in (teacher, a_steps[0].generator, getattr(a_steps[0], "fake", teacher)):
        assert spy.calls
        assert all(call.labels is None for call in spy.calls)
    assert rows["teacher"]["nfe"] == 3
    assert "accuracy" not in rows["generator"]
    with pytest.raises(edm.UserError, match="this network has no classes"):
        script.main(options(guidance=2.0, out=str(tmp_path / "2"), **more))


class Own(nn.Module):
    """Somebody's network: (x, σ, labels) -> clean images."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Embedding(4, 28 * 28)

    def forward(self, x, sigma, labels):
        mean, s2 = self.mean(labels).reshape(x.shape), edm.expand(sigma, x) ** 2
        return (x + s2 * mean) / (1 + s2)


@only(dmd_mnist, dmd2_cifar)
def test_any_network_becomes_a_teacher(script, options, no_titles, monkeypatch, tmp_path):
    """Denoiser(network, shape, label_dim) from load_teacher is all; DMD2's GAN needs features."""
    teacher = edm.Denoiser(Own(), shape=(1, 28, 28), label_dim=4).eval().requires_grad_(False)
    monkeypatch.setattr(script, "load_teacher", lambda cfg, run: teacher)
    rows = script.main(options(**{} if script is dmd_mnist else {"gan_weight": 0.0}))["metrics"]
    assert rows["generator"]["n"] == 40
    weights, _ = edm.load_tensors(tmp_path / "run" / "generator.safetensors")
    assert weights.keys() == {f"model.{name}" for name in Own().state_dict()}


def test_teachers_are_frozen_and_missing_ones_explained(script, tmp_path):
    """--data mnist has one in assets/; for other data the command that trains one is named."""
    teacher = script.load_teacher(script.Config(data="mnist", device="cpu"), None)
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    cfg = script.Config(data=str(tmp_path), device="cpu", out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"edm_teacher\.py --data .*--teacher"):
        script.main(cfg)
    with pytest.raises(FileNotFoundError, match=r"no file absent\.safetensors"):
        script.main(dataclasses.replace(cfg, teacher="absent.safetensors"))
    assert not (tmp_path / "run").exists()


def test_missing_images_stop_the_run_or_are_not_needed(script, options, tmp_path):
    """DMD has pairs; DMD2 needs none with --gan-weight 0, LADD none with --real teacher."""
    alone = {dmd_mnist: {}, dmd2_cifar: {"gan_weight": 0.0}, ladd: {"real": "teacher", "pairs": 4}}
    absent = {"data": str(tmp_path / "absent"), "eval_n": 0}
    if script is not dmd_mnist:
        with pytest.raises(ValueError, match=r"--data .*absent"):
            script.main(options(**absent))
    if script in alone:
        script.main(options(**absent, **alone[script]))
        assert (tmp_path / "run" / "generator.safetensors").exists()


@with_gan
def test_options_fit_the_data_and_each_other(script):
    """The default of --steps depends on --data; what leaves nothing to train is refused."""
    steps = [script.Config(data=data).steps for data in ("mnist", "cifar10")]
    assert steps == ([650, 400] if script is ladd else [300, 150])
    wrong = {ladd: {"real": "teacher", "teacher_steps": 0}}
    with pytest.raises(ValueError, match=r"nothing would train|--real teacher needs"):
        script.Config(**wrong.get(script, {"dm_weight": 0.0, "gan_weight": 0.0}))

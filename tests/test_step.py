"""A batch of pairs → errors → loss and statistics, on networks whose answer can be worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_same_output

from xdpo.batch import Batch, Conditioning, Tokens
from xdpo.config import load_config
from xdpo.families import load_parts
from xdpo.families.stable_diffusion import STABLE_DIFFUSION
from xdpo.loss import PairErrors
from xdpo.noisy import NoisyBatch, NoisyBatchMaker, denoising_errors
from xdpo.reference import Frozen
from xdpo.step import Statistics, means, measure, preference_loss


class Offset(torch.nn.Module):
    """Predicts its input plus one trainable number."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(float(value)))

    def forward(self, latents, timesteps, states):
        return SimpleNamespace(sample=latents + self.value)


def example(targets, weights=1.0):
    """One pair whose noisy latents are zero; `targets` are constant per image, chosen first."""
    zeros = torch.zeros(2, 4, 2, 2)
    constant = torch.tensor(targets).view(2, 1, 1, 1).expand_as(zeros)
    conditioning = Conditioning(text=torch.zeros(2, 1, 1))
    times, weights = torch.zeros(2, dtype=torch.long), torch.full((2,), weights)
    return NoisyBatch(STABLE_DIFFUSION, [0], zeros, times, conditioning, constant, weights, torch.ones(2))


@pytest.fixture
def maker(small_pipeline):
    config = load_config("configs/base.yaml", [f"model.pipeline={small_pipeline}", "data.resolution=16"])
    parts = load_parts(config.model)
    return NoisyBatchMaker(parts, parts.process(config.noise), config, torch.device("cpu"))


def batch_of(positions):
    """Each pair's pixels and tokens depend on its position alone."""
    pixels = [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(p)) * 2 - 1 for p in positions]
    tokens = Tokens(input_ids=torch.tensor([[position % 7] * 8 for position in positions]))
    images, number = torch.stack(pixels, dim=1).flatten(0, 1), torch.tensor(positions)
    return Batch(number, number, [str(position) for position in positions], images, tokens, 0, [])


def test_an_error_is_the_mean_over_the_image_of_the_squared_difference_times_its_weight():
    errors = denoising_errors(Offset(1.0), example([3.0, 0.0], weights=2.0))

    assert errors.tolist() == [2 * (1 - 3) ** 2, 2 * 1**2]


def test_chosen_comes_first_and_the_reference_gets_no_gradient():
    policy, reference = Offset(1.0), Offset(0.5)
    config = load_config("configs/xdpo_sd15.yaml", ["loss.beta=1"]).loss
    errors = measure(policy, Frozen(reference), example([1.0, 0.0]), config).errors
    loss = preference_loss(errors, config).loss.sum()
    loss.backward()

    assert [error.item() for error in errors] == [0.0, 1.0, 0.25, 0.25]
    assert policy.value.grad is not None and policy.value.grad != 0
    assert reference.value.grad is None


@pytest.mark.parametrize(("base", "pulled_to"), [(None, 0.5), (0.25, 0.25)])
def test_a_kl_pulls_to_the_base_model_or_else_to_the_reference(base, pulled_to):
    """Images of target 0, policy 1, reference ½: v₊ − v = 1 for the chosen one, v₋ − v = 0 for the other, at β = 1."""
    policy, reference = Offset(1.0), Offset(0.5)
    network = None if base is None else Offset(base)
    overrides = ["loss.name=diffusion_nft", "loss.kl_weight=0.5"]
    config = load_config("configs/base.yaml", ["output_dir=none", *overrides]).loss
    noisy = example([0.0, 0.0], weights=2.0)
    measured = measure(policy, Frozen(reference), noisy, config, network and Frozen(network))
    inputs = {**measured.inputs, "optimality": torch.tensor([1.0, 0.0])}
    output = preference_loss(measured.errors, config, inputs)
    output.loss.sum().backward()
    # ω·[mean of r·(v₊ − v)² + (1 − r)·(v₋ − v)² + k·(v_θ − v_base)²]
    assert output.loss.item() == pytest.approx(2 * ((1 + 0) / 2 + 0.5 * (1 - pulled_to) ** 2))
    assert policy.value.grad.item() == pytest.approx(2 * (2 * (1 - 0) / 2 + 0.5 * 2 * (1 - pulled_to)))
    assert reference.value.grad is None and (network is None or network.value.grad is None)
    inputs_without = measure(policy, Frozen(reference), noisy, config.model_copy(update={"kl_weight": 0.0})).inputs
    assert set(measured.inputs) - set(inputs_without) == {"base_distance"}


def test_self_normalized_errors_are_scaled_as_errors_of_the_denoised_image(maker):
    """The scale of a time is what x̂_0 is off by where the prediction is off by 1, for ε-prediction √(1 − ᾱ)/√ᾱ."""
    noisy = maker(batch_of([3, 4]), seed=0)
    signal = maker.process.alphas_cumprod[noisy.timesteps]
    torch.testing.assert_close(noisy.denoised_scales, ((1 - signal) / signal).sqrt())
    config = load_config("configs/base.yaml", ["output_dir=none", "loss.name=diffusion_nft"]).loss
    config = config.model_copy(update={"error_weight": "self_normalized"})
    scaled = example([0.0, 0.0])._replace(denoised_scales=torch.tensor([3.0, 0.5]))
    weights = measure(Offset(1.0), Frozen(Offset(0.5)), scaled, config).inputs["error_weights"]
    assert weights[0].tolist() == [3.0, 0.5]  # |v₊ − v| = 1
    assert weights[1].tolist() == pytest.approx([9 / 1e-5, 0.25 / 1e-5])  # |v₋ − v| = 0


def test_a_policy_equal_to_its_reference_has_loss_ln_2_margin_0_and_half_an_accuracy():
    errors = PairErrors(*(torch.tensor([0.1, 0.2]),) * 4)
    config = load_config("configs/xdpo_sd15.yaml").loss
    output = preference_loss(errors, config)
    statistics = means(Statistics(*torch.stack(output.statistics).tolist()), 2, config)

    assert statistics["loss"] == pytest.approx(math.log(2))
    assert statistics["margin"] == 0 and statistics["implicit_accuracy"] == 0.5
    assert statistics["sigmoid_minus_margin"] == 0.5
    assert statistics["d_chosen"] == statistics["d_rejected"] == 0
    assert statistics["policy_error"] == pytest.approx(0.15)


def test_statistics_are_sums_over_pairs_and_count_wins():
    errors = PairErrors(*map(torch.tensor, ([0.1, 0.3], [0.2, 0.1], [0.2, 0.2], [0.2, 0.2])))
    output = preference_loss(errors, load_config("configs/diffusion_dpo_sd15.yaml").loss)
    statistics = output.statistics._asdict()

    assert statistics["implicit_accuracy"] == 1  # the first pair is won, the second lost
    assert statistics["d_chosen"] == pytest.approx(-0.1 + 0.1, abs=1e-6)
    assert statistics["d_rejected"] == pytest.approx(0.0 - 0.1, abs=1e-6)
    assert statistics["clamped"] == 0


def test_a_margin_weight_multiplies_beta_and_the_accuracy_stays_the_labels():
    # d is −0.1 on every chosen image and 0.2 on every rejected one: m = −(1000/2)·w·(−0.3) = 150·w at β = 1000.
    errors = PairErrors(*(torch.full((3,), value) for value in (0.1, 0.4, 0.2, 0.2)))
    config = load_config("configs/diffusion_dpo_sd15.yaml", ["loss.beta=1000", "loss.margin_weight=10"]).loss
    weights = torch.tensor([0.02, -0.01, 0.0])
    output = preference_loss(errors, config, {"margin_weights": weights})
    statistics = output.statistics._asdict()

    margins = [3.0, -1.5, 0.0]
    assert output.loss.tolist() == pytest.approx([math.log1p(math.exp(-margin)) for margin in margins], rel=1e-5)
    assert statistics["margin"] == pytest.approx(sum(margins), rel=1e-5)
    assert statistics["sigmoid_minus_margin"] == pytest.approx(sum(1 / (1 + math.exp(m)) for m in margins), rel=1e-5)
    assert statistics["implicit_accuracy"] == 2.5  # the pair turned round has its label's order, the weightless one ½
    assert statistics["d_chosen"] == pytest.approx(-0.3) and statistics["d_rejected"] == pytest.approx(0.6)


def test_clamped_exponents_are_counted_per_pair_like_everything_else():
    diverged = PairErrors(*map(torch.tensor, ([99.0, 0.1], [99.0, 0.1], [0.1, 0.1], [0.1, 0.1])))  # the first pair
    config = load_config("configs/xdpo_sd15.yaml").loss
    sums = preference_loss(diverged, config).statistics
    assert sums.clamped == 2  # both of its exponents
    assert means(Statistics(*torch.stack(sums).tolist()), 2, config)["clamped"] == 1


def test_pairs_without_the_weights_that_a_config_asks_for_are_not_trained_on():
    errors = PairErrors(*(torch.tensor([0.1, 0.2]),) * 4)
    with pytest.raises(KeyError, match="margin_weights"):
        preference_loss(errors, load_config("configs/diffusion_dpo_sd15.yaml", ["loss.margin_weight=10"]).loss)


def test_a_pair_is_the_same_example_alone_and_in_a_batch(maker):
    together = maker(batch_of([3, 4, 5]), 0, [3, 4, 5])
    alone = maker(batch_of([4]), 0, [4])

    for one, other in (
        *((getattr(together, name), getattr(alone, name)) for name in ("latents", "targets", "timesteps")),
        (together.conditioning["text"], alone.conditioning["text"]),
    ):
        assert_same_output(one[[1, 4]], other)  # chosen and rejected of the second pair


def test_a_pair_shares_its_timestep_noise_and_caption_but_not_its_latents(maker):
    made = maker(batch_of([0, 1]), 0, [0, 1])

    assert torch.equal(made.timesteps[:2], made.timesteps[2:])
    assert torch.equal(made.targets[:2], made.targets[2:])
    assert torch.equal(made.conditioning["text"][:2], made.conditioning["text"][2:])
    assert not torch.allclose(made.latents[:2], made.latents[2:])
    assert not torch.allclose(made.targets[0], made.targets[1])


def test_noisy_latents_are_the_scaled_latents_at_their_timestep(maker):
    from xdpo.noise import draw_noise

    made = maker(batch_of([0]), 0, [0])
    with torch.no_grad():
        posterior = maker.parts.vae.encode(batch_of([0]).images).latent_dist
    own = draw_noise(0, [0], (4, 8, 8), shared=False, stream="posterior")
    latents = (posterior.mean + posterior.std * own) * maker.parts.vae.config.scaling_factor
    expected = maker.process.add_noise(latents, made.targets, made.timesteps)
    assert_same_output(made.latents, expected)


def test_another_seed_or_position_makes_another_example(maker):
    one, seed, position = maker(batch_of([0]), 0, [0]), maker(batch_of([0]), 1, [0]), maker(batch_of([0]), 0, [1])

    assert not torch.equal(one.targets, seed.targets)
    assert not torch.equal(one.targets, position.targets)

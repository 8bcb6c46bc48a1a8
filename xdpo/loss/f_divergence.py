"""f-DPO: the reward that belongs to an f-divergence from the reference, of which xDPO and χPO are members.

Maximising E[r] − β·D_f(p_θ ‖ p_ref), D_f = E_ref[f(z)], z = p_θ / p_ref, gives r = β·f′(z) up to a constant of the
prompt, which cancels in a pair wherever f′ has no value at z = 0 (Wang et al. 2023, "Beyond reverse KL"; [34] of the
xDPO paper). So each member is given by its f′.

For diffusion, the ratio of one denoising step is known only up to a scale: ln z = −κ·d, where d is a mean over
(C, H, W). Every margin here is (β/2)/κ · [f′(z_w) − f′(z_l)]. The logarithm's part is then Diffusion-DPO at β for any
κ, and f′ bends from d ≈ 1/κ on. κ = 1 is the xDPO paper's tacit choice. In training |d| is 1e-3, where every member is
Diffusion-DPO at its β_eff = β·f″(1).
"""

from torch import Tensor

from xdpo.loss.modifiers import negative_log_sigmoid
from xdpo.loss.types import (
    LossOutput,
    PairErrors,
    PerPair,
    count_clamped,
    differences,
    exp_difference,
    no_exponents,
    prepare,
    softplus_difference,
    unknown,
)


def f_dpo_margin(
    errors: PairErrors,
    *,
    beta: PerPair,
    divergence: str,
    kappa: float,
    alpha: float,
    eta: float,
    gamma: float,
    n: float,
) -> Tensor:
    """m = (β/2)/κ · [f′(z_w) − f′(z_l)] with z = exp(−κ·d). Shape (B,). β, κ, α, n positive, η and γ not negative.

    divergence        f(z)                                 f′(z)                  f″(1)
    reverse_kl        z·ln z                               ln z + 1               1        Diffusion-DPO
    forward_kl        −ln z                                −1/z                   1
    jensen_shannon    z·ln z − (z + 1)·ln((z + 1)/2)       ln(2z/(1 + z))         ½        (f of twice the divergence)
    alpha_divergence  (z^(1−α) − (1−α)z − α)/(α(α−1))      (1 − z^(−α))/α         1
    xdpo              η(z·ln z − z) + γ·z^(n+1)/(n+1)      η·ln z + γ·z^n         η + γn   Eq. 9 at κ = 1

    α → 0 is reverse_kl, α = 1 forward_kl; Wang et al. have 0 < α < 1, and f stays convex beyond. η, γ and n act in
    xdpo, α in alpha_divergence. xDPO's `appendix_c` is not the member xdpo, but η·reverse_kl + γn·alpha_divergence
    at α = n: f′ = η·ln z − γ·z^(−n) up to a constant.
    Raises ValueError for an unknown divergence or for errors of different shapes.
    """
    d_chosen, d_rejected = differences(prepare(errors))
    match divergence:
        case "reverse_kl":
            difference = kappa * (d_rejected - d_chosen)
        case "forward_kl":
            difference = exp_difference(d_rejected, d_chosen, kappa)
        case "jensen_shannon":  # ln(2z/(1 + z)) = ln 2 − softplus(−ln z)
            difference = softplus_difference(kappa * d_rejected, kappa * d_chosen)
        case "alpha_divergence":
            difference = exp_difference(d_rejected, d_chosen, alpha * kappa) / alpha
        case "xdpo":
            power = exp_difference(-d_chosen, -d_rejected, n * kappa)
            difference = eta * kappa * (d_rejected - d_chosen) + gamma * power
        case _:
            raise unknown("divergence", divergence)
    return 0.5 * beta / kappa * difference


def _clamped(errors: PairErrors, divergence: str, kappa: float, alpha: float, n: float) -> Tensor:
    """How many exponents of f_dpo_margin met MAX_EXPONENT; a pair has two, or none."""
    d_chosen, d_rejected = differences(prepare(errors))
    match divergence:
        case "forward_kl":
            return count_clamped((d_chosen, d_rejected), kappa)
        case "alpha_divergence":
            return count_clamped((d_chosen, d_rejected), alpha * kappa)
        case "xdpo":
            return count_clamped((-d_chosen, -d_rejected), n * kappa)
        case "reverse_kl" | "jensen_shannon":
            return no_exponents(d_chosen)
    raise unknown("divergence", divergence)


def f_dpo(
    errors: PairErrors,
    *,
    beta: PerPair,
    divergence: str,
    kappa: float,
    alpha: float,
    eta: float,
    gamma: float,
    n: float,
    label_smoothing: float,
) -> LossOutput:
    """The objective `f_dpo`: −log σ(m) with f_dpo_margin.

    Source: Wang et al. 2023 (arXiv 2309.16240), for language models, α of 0.3, 0.5 and 0.7. Nothing is published for
    diffusion: β is Diffusion-DPO's, κ = 1 the xDPO paper's, η, γ and n its headline.
    """
    margin = f_dpo_margin(errors, beta=beta, divergence=divergence, kappa=kappa, alpha=alpha, eta=eta, gamma=gamma, n=n)
    clamped = _clamped(errors, divergence, kappa, alpha, n)
    return LossOutput(negative_log_sigmoid(margin, label_smoothing), margin, clamped)


def chipo(errors: PairErrors, *, beta: PerPair, kappa: float, max_reward: float, label_smoothing: float) -> LossOutput:
    """The objective `chipo`, χPO: −log σ(m), m = clip((β/2)/κ · [φ(z_w) − φ(z_l)], −2R, 2R), φ(z) = z + ln z.

    Source: Huang et al. 2024 (arXiv 2407.13399; [32] of the xDPO paper), Algorithm 1: DPO with the link φ, whose
    regulariser is χ² plus KL, and the difference of rewards clipped to twice their bound R (`max_reward`).

    The port to diffusion is ours, as nothing is published. φ is f′ of z²/2 + z·ln z − z, so that this is f_dpo's
    xdpo member at η = γ = n = 1, with z = exp(−κ·d). Written out,

        m = −(β/2) · [(d_w − d_l) + (exp(−κ·d_l) − exp(−κ·d_w))/κ]

    which is xDPO's Eq. 9 at η = 1, γ = 1/κ, n = κ: the paper's rows with η = 1 are χPO at κ = n, unclipped. κ = 1
    takes the mean error for the log ratio; κ = β/2 takes all of Diffusion-DPO's scale into it (ln z = −(β/2)·d) and
    leaves m = φ(z_w) − φ(z_l), the link of χPO at its own β = 1. Near d = 0 it is Diffusion-DPO at 2β, whatever κ;
    β = 1000 therefore starts like the published 2000. R is ours too: at ±20 the loss of a correct pair is 2e-9.

    Limits: R → ∞ is Eq. 9; κ → 0 Diffusion-DPO at 2β. A clipped pair has no gradient, one that is hopelessly wrong
    included: that is the method.
    """
    # The link φ is f_dpo's member xdpo, in which α does not act.
    margin = f_dpo_margin(errors, beta=beta, divergence="xdpo", kappa=kappa, alpha=1.0, eta=1.0, gamma=1.0, n=1.0)
    margin = margin.clamp(-2 * max_reward, 2 * max_reward)
    clamped = _clamped(errors, "xdpo", kappa, alpha=1.0, n=1.0)
    return LossOutput(negative_log_sigmoid(margin, label_smoothing), margin, clamped)

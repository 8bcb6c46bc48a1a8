"""What combines with the objectives: label smoothing, a safeguard on the rejected gradient, weights from scores, a KL.

Label smoothing acts on the margin's loss, the safeguard on the errors before the objective sees them, the weights of a
reward gap on β, which scales the margin, and the KL is added to the loss. (Weights of a timestep multiply the errors:
noise/diffusion.py.)
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xdpo.loss.types import LossOutput, PairErrors, PerPair, at_least_float32


def negative_log_sigmoid(margin: Tensor, label_smoothing: PerPair = 0.0) -> Tensor:
    """−(1 − s)·log σ(m) − s·log σ(−m): a label is wrong with probability s, 0 ≤ s ≤ ½. Shape of the margin.

    Source: conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"). s = 0 is −log σ(m). With
    s > 0 the loss has its minimum at the finite margin m = ln((1 − s)/s), and from there on pushes back. A tie has
    s = ½, and its minimum at 0.
    """
    return -((1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin))


def safeguard(errors: PairErrors, policy_dot: Tensor, *, mu: float) -> PairErrors:
    """The errors, with the gradient of the policy's rejected one scaled by λ; all values are unchanged.

        λ = clip((1 − μ)·‖a_w‖² / <a_w, a_l>, 0, 1)  where <a_w, a_l> > 0, else 1;  a = prediction − target

    `policy_dot` (B,) is the policy's <a_w, a_l>, a mean over (C, H, W) with the same ω(t) as the errors (the pair
    shares its timestep, so ω cancels); ‖a_w‖² is errors.policy_chosen. λ carries no gradient. 0 ≤ μ ≤ 1: μ = 1
    leaves the rejected image no gradient where the two residuals agree.

    Source: Diffusion-SDPO (arXiv 2511.03317), its public code; μ = 0.9 with DPO and DMPO, 0.2 with DSPO. There λ is one
    number per forward pass; here it is one per pair, so that it doesn't depend on how a batch is split. To first
    order in the predictions, raising e_l can then take back at most the share 1 − μ of what e_w falls, if the
    objective pulls at both with the same slope, as Diffusion-DPO does. Others (xDPO away from d = 0, f_dpo, MaPO)
    have two different slopes, and the guarantee holds up to their ratio.
    """
    dot = at_least_float32(policy_dot.detach())
    agree = dot > 0
    bound = (1 - mu) * errors.policy_chosen.detach() / torch.where(agree, dot, 1.0)
    share = torch.where(agree, bound.clamp(0, 1), 1.0)
    rejected = errors.policy_rejected
    # x.detach() + λ·(x − x.detach()): the bracket is exactly zero, so the value is unchanged.
    return errors._replace(policy_rejected=rejected.detach() + share * (rejected - rejected.detach()))


def preference_probability(chosen_scores: Tensor, rejected_scores: Tensor, *, lowest: float, highest: float) -> Tensor:
    """p = softmax of the two scores after (score − lowest)/(highest − lowest): how sure a scorer is. Shape (B,).

    Source: SmPO-Diffusion, which takes PickScore's smallest and largest value over its data set for the range
    (as raw cosines 0.1154 and 0.2820). p lies between σ(−1) = 0.27 and σ(1) = 0.73 inside that range.
    Raises ValueError for an empty range.
    """
    if not highest > lowest:
        raise ValueError(f"scores need a range with highest above lowest, got {lowest} to {highest}")
    return torch.sigmoid((at_least_float32(chosen_scores) - at_least_float32(rejected_scores)) / (highest - lowest))


def margin_weights(probability: Tensor, *, scale: float) -> Tensor:
    """scale·(2p − 1), the factor of a pair's margin: multiply β by it. Shape (B,).

    Source: SmPO-Diffusion, scale 10. p = ½ drops the pair, p < ½ reverses it; p = (1 + 1/scale)/2 leaves
    the margin as it is. For objectives with the key margin_weight: pass beta = beta · margin_weights.
    """
    return scale * (2 * at_least_float32(probability) - 1)


def with_kl(output: LossOutput, base_distance: Tensor, *, weight: float) -> LossOutput:
    """The output with k·‖v_θ − v_base‖² added to its loss, k = weight: a KL of each denoising step from the base model.

    `base_distance` (2B,) is the mean over (C, H, W) of the squared difference of the policy's and the base model's
    predictions, times ω(t), on the images of B pairs, chosen first; a pair's is the mean over its two images. The KL of
    two Gaussian steps is this distance up to a factor of the time and the sampler, which k absorbs.

    Source: DiffusionNFT (arXiv 2509.16117) and its public code, k = 1e-4 beside 5/β times its errors.
    Limits: k = 0 changes nothing; k → ∞ keeps the policy at the base model.
    """
    return output._replace(loss=output.loss + weight * base_distance.view(2, -1).mean(0))

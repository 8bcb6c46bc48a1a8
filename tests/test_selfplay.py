"""Self-play: which pair, round and snapshot a position has. That it trains and resumes is in test_objective_runs.py."""

import pytest

from xdpo.config import load_config
from xdpo.noise import SampleOrder
from xdpo.selfplay import RoundOrder, Rounds, draw_snapshot


def rounds_of(*overrides):
    return Rounds.of(load_config("configs/base.yaml", ["self_play.every=3", "train.total_batch_pairs=4", *overrides]))


def test_a_round_has_an_image_for_each_of_its_pairs_unless_the_buffer_is_smaller():
    assert rounds_of() == Rounds(steps=3, positions=12, slots=12)
    assert rounds_of("self_play.buffer_pairs=5") == Rounds(steps=3, positions=12, slots=5)
    assert rounds_of("self_play.buffer_pairs=100").slots == 12


def test_a_buffer_is_gone_through_again_and_again_within_its_round():
    rounds = rounds_of("self_play.buffer_pairs=5")

    assert [rounds.slot(position) for position in range(12)] == [(0, slot) for slot in (0, 1, 2, 3, 4) * 2 + (0, 1)]
    assert rounds.slot(12) == (1, 0)


def test_rounds_take_their_pairs_one_after_another_from_the_training_order():
    order = SampleOrder(0, 7, shuffle=True)
    whole = RoundOrder(order, rounds_of())
    assert [whole[position] for position in range(30)] == [order[position] for position in range(30)]

    small = RoundOrder(order, rounds_of("self_play.buffer_pairs=5"))
    assert [small[position] for position in range(12, 17)] == [order[position] for position in range(5, 10)]


def test_the_reference_is_any_snapshot_so_far_the_latest_or_the_base():
    drawn = [draw_snapshot(0, 9, "random") for _ in range(3)]
    assert len(set(drawn)) == 1  # of seed and round alone
    assert {draw_snapshot(seed, 3, "random") for seed in range(60)} == {0, 1, 2, 3}
    assert [draw_snapshot(0, number, "random") for number in (0, 0)] == [0, 0]
    assert draw_snapshot(5, 9, "latest") == 9 and draw_snapshot(5, 9, "base") == 0
    with pytest.raises(ValueError, match="choose from random, latest, base"):
        draw_snapshot(0, 1, "newest")

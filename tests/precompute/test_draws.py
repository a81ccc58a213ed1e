from __future__ import annotations

import numpy as np

from precompute.draws import draw_uniforms, position_keys


def test_numbers_of_a_position_do_not_depend_on_the_others() -> None:
    keys = position_keys(7, "doc#3", np.arange(10))
    some = position_keys(7, "doc#3", np.array([8, 2]))
    np.testing.assert_array_equal(draw_uniforms(some, 5), draw_uniforms(keys, 9)[[8, 2], :5])


def test_another_seed_example_or_position_gives_other_numbers() -> None:
    keys = np.concatenate(
        [position_keys(seed, name, np.arange(50)) for seed in (0, 1) for name in ("doc#0", "doc#1")]
    )
    assert len(np.unique(draw_uniforms(keys, 20))) == 200 * 20


def test_numbers_are_uniform_and_independent() -> None:
    uniforms = draw_uniforms(position_keys(3, "x", np.arange(2000)), 50)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    counts = np.histogram(uniforms, 100, (0, 1))[0]
    # Chi-squared with 99 degrees of freedom: 5 standard deviations are 71.
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 71
    for other in (np.roll(uniforms, 1, axis=0), np.roll(uniforms, 1, axis=1)):
        assert abs(np.corrcoef(uniforms.reshape(-1), other.reshape(-1))[0, 1]) < 5 / np.sqrt(uniforms.size)


def test_keys_are_part_of_the_format() -> None:
    # A store that is resumed with other numbers would differ from itself.
    assert draw_uniforms(position_keys(17, "train/0#2", np.array([5])), 1).tolist() == [[0.7207153036673818]]

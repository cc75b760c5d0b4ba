"""The shortcut that appends zero channels, and the channels that it loses."""

from __future__ import annotations

import pytest
import torch

from isthmus.layers.padded_shortcut import PaddedShortcut


def test_channels_are_padded_on_both_sides() -> None:
    x = torch.randn(2, 3, 5, 4)
    y = PaddedShortcut(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 2)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 5:].any()
    assert torch.equal(PaddedShortcut(3, 3, 1)(x), x)


def test_channels_that_go_make_the_padding_thinner_and_the_input_narrower() -> None:
    shortcut, x = PaddedShortcut(4, 8, 1), torch.randn(1, 4, 3, 3)
    whole = shortcut(x)
    shortcut.drop([0, 3, 5, 7])  # padding in front, channels 1 and 3 of the input, padding behind
    assert (shortcut.zeros_before, shortcut.channels, shortcut.zeros_after, shortcut.out_channels) == (1, 2, 1, 4)
    assert torch.equal(shortcut(x[:, [0, 2]]), whole[:, [1, 2, 4, 6]])


def test_sizes_that_cannot_be_are_told() -> None:
    for sizes in ((4, 3, 1), (0, 3, 1), (3, 4, 0)):
        with pytest.raises(ValueError, match="cannot pad"):
            PaddedShortcut(*sizes)

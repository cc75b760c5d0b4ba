"""Numbers: masked likelihood, exact joint reading, refusals, any encoder, the baseline with an eleventh class."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from isthmus.codec import Codec
from isthmus.decoders.digit_sequence import (
    AbsentDigits,
    DigitSequence,
    NumberScores,
    negative_log_likelihood,
    read,
    read_length_first,
    right,
    targets,
)
from isthmus.encoders.backbone import Backbone


def _scores(count: int, places: int = 3, classes: int = 4, seed: int = 0) -> NumberScores:
    generator = torch.Generator().manual_seed(seed)
    return NumberScores(
        2 * torch.randn(count, places + 2, generator=generator),
        torch.randn(count, places, classes, generator=generator),
    )


def test_reading_is_the_maximum_over_every_number() -> None:
    scores = _scores(40)
    reading, length, digits = read(scores), scores.length.log_softmax(-1), scores.digits.log_softmax(-1)
    for i in range(40):
        best = {(): length[i, 0], None: length[i, 4]}
        for n in range(1, 4):
            for number in itertools.product(range(4), repeat=n):
                best[number] = length[i, n] + sum(digits[i, k, d] for k, d in enumerate(number))
        answer = max(best, key=lambda number: float(best[number]))
        assert float(best[answer]) == pytest.approx(float(reading.log_prob[i]), abs=1e-5)
        assert reading.strings()[i] == (None if answer is None else "".join(map(str, answer)))


def test_the_likeliest_length_first_is_not_the_likeliest_number() -> None:
    digits = torch.zeros(1, 2, 10)
    digits[0, 0, 7] = 20.0  # the second digit could be anything
    scores = NumberScores(torch.tensor([[-9.0, 1.0, 1.5, -9.0]]), digits)
    assert read(scores).strings() == ["7"]
    assert read_length_first(scores).length.tolist() == [2]
    assert read(scores).log_prob > read_length_first(scores).log_prob


def test_digits_that_do_not_exist_get_no_gradient() -> None:
    scores = _scores(3)
    scores.digits.requires_grad_()
    length, digits = torch.tensor([1, 4, 0]), torch.tensor([[2, 3, 1], [0, 0, 0], [3, 3, 3]])
    loss = negative_log_likelihood(scores, length, digits)
    loss.sum().backward()
    assert scores.digits.grad is not None
    assert scores.digits.grad[0, 0].abs().sum() > 0
    assert scores.digits.grad[0, 1:].abs().sum() == scores.digits.grad[1:].abs().sum() == 0, (
        "more than N teach the length"
    )
    assert torch.equal(
        loss, negative_log_likelihood(scores, length, torch.full_like(digits, -1).where(length[:, None] != 1, digits))
    )


def test_targets_of_empty_long_and_leading_zero_numbers() -> None:
    length, digits = targets([torch.tensor([0, 7]), torch.tensor([], dtype=torch.int64), torch.arange(4)], 3)
    assert length.tolist() == [2, 0, 4]
    assert digits.tolist() == [[0, 7, -1], [-1, -1, -1], [-1, -1, -1]]
    sure = NumberScores(torch.eye(5)[length] * 50, torch.nn.functional.one_hot(digits.clamp_min(0), 10).float() * 50)
    reading = read(sure)
    assert reading.strings() == ["07", "", None]
    assert right(reading, length, digits).all()
    assert negative_log_likelihood(sure, length, digits).max() < 1e-4


def test_half_precision_scores_are_summed_in_float32() -> None:
    scores = _scores(5)
    half = NumberScores(scores.length.half(), scores.digits.half())
    assert read(half).log_prob.dtype == torch.float32
    assert (
        negative_log_likelihood(half, torch.zeros(5, dtype=torch.int64), torch.zeros(5, 3, dtype=torch.int64))
        .isfinite()
        .all()
    )


def test_one_decoder_serves_maps_tokens_and_vectors() -> None:
    decoder = DigitSequence(8, max_digits=2, grid=(2, 3), hidden=(16,))
    for level in (torch.rand(2, 8, 5, 9), torch.rand(2, 8, 1, 1), torch.rand(2, 11, 8), torch.rand(2, 8)):
        scores = decoder([level])
        assert scores.length.shape == (2, 4)
        assert scores.digits.shape == (2, 2, 10)
    with pytest.raises(ValueError, match="7 channels; this decoder was made for 8"):
        decoder([torch.rand(2, 7, 4, 4)])


def test_on_a_timm_encoder_it_saves_as_a_codec(tmp_path: Path) -> None:
    encoder = Backbone("resnet10t")
    codec = Codec(encoder, decoder=DigitSequence(encoder.feature_info[-1].channels, hidden=(8,))).eval()
    codec.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    again = Codec.from_pretrained(tmp_path)(images).prediction
    assert torch.equal(again.digits, codec(images).prediction.digits)


def test_the_eleventh_class_ends_the_number() -> None:
    decoder = AbsentDigits(DigitSequence(4, max_digits=3, grid=1))
    scores = decoder([torch.rand(2, 4)])
    assert scores.digits.shape == (2, 3, 11)
    assert scores.length.shape == (2, 0)
    sure = torch.full((1, 3, 11), -20.0)
    sure[0, 0, 4] = sure[0, 1, 10] = sure[0, 2, 9] = 20.0
    reading = AbsentDigits.read(NumberScores(torch.empty(1, 0), sure))
    assert reading.strings() == ["4"]
    loss = AbsentDigits.loss(NumberScores(torch.empty(1, 0), sure), torch.tensor([1]), torch.tensor([[4, -1, -1]]))
    assert loss.item() == pytest.approx(40.0, abs=1e-3), "a digit where there is none costs"


@pytest.mark.parametrize(("length", "digits", "message"), [(5, 0, "0 to 4"), (1, 9, "0 to 3")])
def test_impossible_targets_are_told(length: int, digits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        negative_log_likelihood(_scores(1), torch.tensor([length]), torch.full((1, 3), digits))
    with pytest.raises(ValueError, match="at least 1"):
        DigitSequence(8, max_digits=0)
